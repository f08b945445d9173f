"""What is done, and how it becomes done.

    _renderfarm/job.json       the frozen job: what decides pixels and layout (create-if-absent)
    _renderfarm/rows/…         the rows that a sweep, templates or a file of text became (see frozen_rows)
    _renderfarm/grid.json      rows per part, as the first worker measured (create-if-absent); only for `part_rows: auto`
    _renderfarm/profile.json   the render profile, by the first worker ready (create-if-absent)
    _renderfarm/profiles/…     others, by their SHA-256, if the job allows them
    _renderfarm/parts/…        one key a part, its counts in its name, so that one listing tells what is done, and in it the
                               SHA-256 of the commit object (see layouts) and who committed it; derived: a missing entry costs one
                               request, never an image
    _renderfarm/logs/…         what each run said while it went on (see journal)
    _renderfarm/retries/…      requests to render failed samples again, each as a part of its own (see requests)
    _renderfarm/waived/…       failed samples that may stay errors (see requests)
    _renderfarm/inputs/…       files that rows and job gave (images, LoRA adapters, networks), by their SHA-256
    _renderfarm/damaged/…      what `run --repair` set aside, by run, under the keys that it had (see repair)
    data/…, errors/…           the commit objects (see layouts)
    originals/…                pictures before the job's `after`, if they are kept; like images, only those count that a table names

Order of a part: images and originals, commit object, views, index entry. Whoever loses the create of the commit object reads
back what is stored and reports that, whether it is somebody else's or its own whose reply was lost.

A retry is a part of its own, whose name ends in its number, with its own commit. Its samples had ended as errors in the renderings
before it, none of which is written again, so how a sample ended says the last rendering that has it. Counts follow by sums alone: a
retry's images are so many errors less.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from renderfarm import requests
from renderfarm.errors import AlreadyExists, Fatal, InvalidJob, ProfileMismatch
from renderfarm.layouts import LAYOUTS
from renderfarm.layouts.base import Committed, Layout, PartWriter, error_view_bytes, errors_bytes, errors_key, read_errors_only
from renderfarm.plan import Grid, where_row
from renderfarm.records import Part, PartId, PartReceipt, Retry, SampleKey
from renderfarm.storage import OURS, Store

FORMAT_VERSION = 1
JOB, GRID, PROFILE, PROFILES, PROGRESS, PARTS, RUNS, ANNOUNCED = (
    f"_renderfarm/{name}" for name in ("job.json", "grid.json", "profile.json", "profiles", "progress.json", "parts", "runs", "announced")
)


KEPT = "_renderfarm/inputs"
FAILED_SAID = 10  # of a part's errors, by its receipt


def keep(store: Store, data: bytes) -> str:
    """Keep a file that decides pixels, so that the output alone can be rendered again. Returns its SHA-256, its name there."""
    digest = hashlib.sha256(data).hexdigest()
    if not store.exists(key := f"{KEPT}/{digest}"):
        with contextlib.suppress(AlreadyExists):
            store.put_if_absent(key, data)
    return digest


def kept(store: Store, sha256: str) -> bytes:
    """Raises InvalidJob where the file is gone or has become another one."""
    try:
        data = store.read(f"{KEPT}/{sha256}")
    except KeyError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InvalidJob(f"{store.url}/{KEPT}/{sha256} is missing or damaged, and rows need it to be rendered again; put the file back")
    return data


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(store: Store, key: str) -> dict[str, Any]:
    """Raises KeyError where there is none, and Fatal for one that is damaged."""
    try:
        value: Any = json.loads(store.read(key))
        if isinstance(value, dict):
            return value
        reason = "not an object"
    except ValueError:
        reason = "not JSON"
    raise _damaged(store, key, reason)


def _damaged(store: Store, key: str, reason: str) -> Fatal:
    return Fatal(f"{store.url}/{key} is damaged ({reason}); restore it from a copy, or render into another output")


def read_progress(store: Store) -> dict[str, Any]:
    """The last heartbeat; empty where there is none, or none that can be read (the next one replaces it)."""
    try:
        return read_json(store, PROGRESS)
    except (KeyError, Fatal):
        return {}


# ---------------------------------------------------------------------------------------------- the frozen job


def not_ours(store: Store) -> str | None:
    """A file or folder that lies where an output is to begin, and that no run has written."""
    return next((name for name in store.names() if name != OURS), None)


def freeze_job(store: Store, wanted: dict[str, Any]) -> dict[str, Any]:
    """Store what decides pixels and layout, or check that it is what the output was begun with.

    Returns the stored value. Raises InvalidJob that prints every difference.
    """
    wanted = {"format_version": FORMAT_VERSION, **wanted}
    try:
        store.put_if_absent(JOB, to_json(wanted))
        return wanted
    except AlreadyExists:
        return check_job(store, wanted)


def read_job(store: Store) -> dict[str, Any]:
    """The frozen job. Raises KeyError where there is none, Fatal for one that does not say what readers need."""
    job = read_json(store, JOB)
    try:
        where, part_rows = job["manifest"]["where"], job["output"]["part_rows"]
        numbers = [*(file["rows"] for file in job["manifest"]["files"]), 1 if part_rows == "auto" else part_rows]
        known = all(isinstance(given, dict) for given in (where or {}, job["model"], job["render"]))
        known = known and job["output"]["layout"] in LAYOUTS
        if known and numbers[-1] > 0 and all(isinstance(number, int) for number in numbers):
            return job
    except (KeyError, TypeError):
        pass
    raise _damaged(store, JOB, "not what a run freezes")


def check_job(store: Store, wanted: dict[str, Any]) -> dict[str, Any]:
    """The stored job, if it is the wanted one. Raises KeyError where there is none, InvalidJob for another."""
    wanted = {"format_version": FORMAT_VERSION, **wanted}
    stored = read_json(store, JOB)
    refuse_differences(store, differences(stored, json.loads(to_json(wanted))))
    return stored


def refuse_differences(store: Store, found: list[str]) -> None:
    """Raises InvalidJob for any. Never replaces what is there: another driver may be about to render what it froze."""
    if found:
        begin_anew = "" if store.list(PARTS) else f"; nothing is rendered yet, so you may also remove {store.url}/{JOB}"
        raise InvalidJob(
            f"{store.url} was begun with other settings, and these decide pixels or layout:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nrestore them to continue, or give another output (--out)"
            + begin_anew
        )


def frozen_grid(store: Store, job: dict[str, Any]) -> Grid | None:
    """The grid of an output, from job.json's value; None for `part_rows: auto` where no worker has measured yet.

    Raises Fatal where parts are committed and the measured number is gone: another one would give them other rows.
    """
    rows = sum(file["rows"] for file in job["manifest"]["files"])
    part_rows = _part_rows(store, job["output"]["part_rows"])
    return None if part_rows is None else Grid(rows, part_rows, where_row(job["manifest"]["where"]))


def _part_rows(store: Store, given: int | str) -> int | None:
    if given != "auto":
        return int(given)
    try:
        return _measured(store)
    except KeyError:
        if any(store.list(folder) for folder in (PARTS, "data", "errors")):
            raise Fatal(f"{store.url}/{GRID} is gone, and parts are committed: restore it from a copy") from None
        return None


def freeze_part_rows(store: Store, part_rows: int, seconds_per_image: float) -> int:
    """Publish the measured rows per part; the published number, which may be another driver's."""
    try:
        store.put_if_absent(GRID, to_json({"part_rows": part_rows, "seconds_per_image": round(seconds_per_image, 6)}))
        return part_rows
    except AlreadyExists:
        return _measured(store)


def measured_seconds(store: Store) -> float | None:
    """Seconds an image took the first worker, alone; None where none has measured."""
    try:
        return float(read_json(store, GRID).get("seconds_per_image") or 0) or None
    except KeyError:
        return None


def _measured(store: Store) -> int:
    value = read_json(store, GRID).get("part_rows")
    if not isinstance(value, int) or value < 1:
        raise _damaged(store, GRID, "no part_rows")
    return value


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Every place in which two JSON values differ, as a line for a person."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for k, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}[{k}]")]
    return [] if old == new else [f"{path}: {json.dumps(old)} there, {json.dumps(new)} now"]


def publish_profile(store: Store, profile: dict[str, Any], *, record_others: bool = False) -> str:
    """Publish this worker's profile, or check that it is the published one. Returns its SHA-256.

    `record_others`: another profile than the published one is stored beside it instead of being refused.
    """
    data, sha256 = to_json(profile), profile_sha256(profile)
    try:
        store.put_if_absent(PROFILE, data)
    except AlreadyExists:
        found = differences(read_json(store, PROFILE), json.loads(data))
        if found and record_others:
            store.put(f"{PROFILES}/{sha256}.json", data)
        elif found:
            raise ProfileMismatch(
                "this worker would render other pixels than the output's profile promises:\n"
                + "\n".join(f"  {line}" for line in found)
                + "\nrun where these are equal, give another output (--out), or let rows name their own profile "
                "(workers.other_profiles: record)"
            ) from None
    return sha256


def first_profile(store: Store, profile: dict[str, Any]) -> dict[str, Any]:
    """Publish a profile if there is none; the one that is there then."""
    try:
        store.put_if_absent(PROFILE, to_json(profile))
        return profile
    except AlreadyExists:
        return read_json(store, PROFILE)


def has_profile(store: Store) -> bool:
    return store.exists(PROFILE)


def read_profile(store: Store) -> dict[str, Any]:
    """The render profile. Raises InvalidJob where no worker has published one yet, and Fatal where one is lost."""
    try:
        return read_json(store, PROFILE)
    except KeyError:
        if store.list(PARTS):
            raise Fatal(f"{store.url}/{PROFILE} is missing, and parts are committed; restore it from a copy") from None
        raise InvalidJob(f"{store.url}: nothing was rendered yet; run its job first") from None


def read_profiles(store: Store) -> dict[str, dict[str, Any]]:
    """Every profile that rows may name, by its SHA-256: the output's own and the recorded others."""
    found = [read_profile(store), *(read_json(store, key) for key in store.list(PROFILES))]
    return {profile_sha256(profile): profile for profile in found}


def profile_sha256(profile: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(profile)).hexdigest()


# ---------------------------------------------------------------------------------------------- parts


def read_part(store: Store, layout: Layout, part: Part) -> tuple[str, Committed]:
    """A part's commit object, by its key, without its pictures. Raises KeyError where there is none, Fatal for a damaged one."""
    try:
        return _read(store, layout.commit_key(part), layout.read)
    except KeyError:
        return _read(store, errors_key(part), read_errors_only)


def _read(store: Store, key: str, read: Callable[[BinaryIO], Committed]) -> tuple[str, Committed]:
    with store.open(key) as file:
        return key, read(file)


def find_commit(store: Store, layout: Layout, part: Part) -> PartReceipt | None:
    """The receipt of a part that somebody has committed, or None. Mends its views and index entry if they are missing."""
    try:
        _, committed = read_part(store, layout, part)
    except KeyError:
        return None
    return _finish(store, layout, part, committed, adopted=True)


def publish(
    store: Store,
    layout: Layout,
    part: Part,
    writer: PartWriter,
    images: pa.Table,
    errors: pa.Table,
    by: Callable[[], Mapping[str, Any]] = dict,
) -> PartReceipt:
    """Commit a part. `writer`: the layout's, which was given every image that `images` names. `by`: who says so, and how long it
    took, for its index entry; asked when that is written."""
    following = requests.key(PartId(part.index, part.retry + 1))
    if store.exists(following) and (found := find_commit(store, layout, part)) is not None:
        return found  # as errors alone, and a retry may have their images by now
    if len(images):
        key, data, read = layout.commit_key(part), writer.commit_object(images, errors), layout.read
    else:
        key, data, read = errors_key(part), errors_bytes(errors), read_errors_only
    with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
        committed = read(file)
    try:
        store.put_if_absent(key, data)
    except AlreadyExists:
        if (found := find_commit(store, layout, part)) is not None:
            return found
        assert not len(images), f"{key} exists but cannot be read back"
        store.put(key, data)  # in the place of a view of what is gone
    if not len(images) and (found := find_commit(store, layout, part)) and found.images:
        return found  # another worker had images for this part, and images beat errors
    return _finish(store, layout, part, committed, adopted=False, by=by)


def announce(store: Store, part: Part, row: int, token: str) -> None:
    """Say which row is rendered next, so that a death after this names it. `token`: the attempt that says so."""
    store.put(f"{ANNOUNCED}/{part.name}.json", to_json({"row": row, "token": token}))


def announced_row(store: Store, part: Part, token: str) -> int | None:
    """The row that this very attempt announced last; an announcement of another run or attempt blames nobody."""
    try:
        announced = read_json(store, f"{ANNOUNCED}/{part.name}.json")
    except KeyError:
        return None
    return int(announced["row"]) if announced.get("token") == token else None


# ------------------------------------------------------------------------------------------------- how samples ended


@dataclass(frozen=True)
class Ended:
    """How a part's samples have ended by now. `errors`: those without an image, as the last rendering of each says; `by`: which one."""

    images: set[SampleKey]
    errors: dict[SampleKey, dict[str, Any]]
    by: dict[SampleKey, PartId]


def ended(store: Store, layout: Layout, index: int, renderings: int) -> Ended:
    """By the first so many renderings of a part. Raises Fatal where the first one is gone, or any is damaged."""
    found = Ended(set(), {}, {})
    for retry in range(renderings):
        part = Part(index, 0, 0, retry)
        try:
            _, committed = read_part(store, layout, part)
        except KeyError:
            if retry == 0:
                raise Fatal(f"part {index} is not committed, or its table is gone; run its job (with --repair) first") from None
            continue  # asked for, and not rendered yet
        images = _keys(committed.images)
        found.images.update(images)
        errors = dict(zip(_keys(committed.errors), committed.errors.to_pylist(), strict=True))
        found.errors.update(errors)
        found.by.update(dict.fromkeys(errors, part.id))
        for key in found.images & found.errors.keys():  # an image beats any error
            del found.errors[key], found.by[key]
    return found


def _keys(table: pa.Table) -> list[SampleKey]:
    return [SampleKey(*pair) for pair in zip(table.column("row").to_pylist(), table.column("image_index").to_pylist(), strict=True)]


def superseded(before: Ended, committed: Committed) -> dict[str, int]:
    """Of what classes the errors were that a retry has taken the place of. `before`: how its samples had ended."""
    there = [*_keys(committed.images), *_keys(committed.errors)]
    return dict(sorted(Counter(str(before.errors[key]["error_class"]) for key in there if key in before.errors).items()))


# ------------------------------------------------------------------------------------------------- the index of parts


def _finish(
    store: Store, layout: Layout, part: Part, committed: Committed, *, adopted: bool, by: Callable[[], Mapping[str, Any]] = dict
) -> PartReceipt:
    images, errors = committed.images, committed.errors
    if len(images):
        _mend_views(store, layout, part, images, errors)
    gone = superseded(ended(store, layout, part.index, part.retry), committed) if part.retry else {}
    receipt = _receipt(part, committed, gone, adopted=adopted)
    entry: dict[str, Any] = {"error_classes": receipt.error_classes, "commit_sha256": committed.sha256}
    if part.retry:
        entry["superseded"] = receipt.superseded
    if not (adopted and _says(store, entry_key(part, committed), entry)):  # it may say whose part it is
        said = by()
        store.put(entry_key(part, committed), to_json(entry | dict(said)))
        receipt = replace(receipt, seconds=said.get("seconds", {}))
    return receipt


def _says(store: Store, key: str, wanted: dict[str, Any]) -> bool:
    try:
        return wanted.items() <= _read_entry(store, key).items()
    except (KeyError, Fatal):
        return False


def _receipt(part: Part, committed: Committed, superseded: dict[str, int], *, adopted: bool) -> PartReceipt:
    images, errors = committed.images, committed.errors
    return PartReceipt(
        part=part.index,
        images=len(images),
        errors=len(errors),
        bytes=pc.sum(images.column("bytes")).as_py() or 0 if len(images) else 0,
        adopted=adopted,
        error_classes={str(item["values"]): int(item["counts"]) for item in pc.value_counts(errors.column("error_class")).to_pylist()},
        retry=part.retry,
        superseded=superseded,
        failed=_first_failed(errors),
    )


def _first_failed(errors: pa.Table) -> tuple[tuple[int, int, str, str], ...]:
    names = ("row", "image_index", "row_id", "error_class")
    return tuple(tuple(row[name] for name in names) for row in errors.slice(0, FAILED_SAID).select(names).to_pylist())


def entry_key(part: Part, committed: Committed) -> str:
    receipt = _receipt(part, committed, {}, adopted=True)
    return f"{PARTS}/{part.name}.i{receipt.images}.e{receipt.errors}.b{receipt.bytes}.json"


def _mend_views(store: Store, layout: Layout, part: Part, images: pa.Table, errors: pa.Table) -> None:
    """Make the views say what the commit object says; the errors of a worker that lost to images may lie there."""
    for key, data in layout.views(part, images, errors).items():
        if not store.exists(key) or store.read(key) != data:
            store.put(key, data)
    key, there = errors_key(part), store.exists(errors_key(part))
    if there or len(errors):
        data = error_view_bytes(errors)
        if not there or store.read(key) != data:
            store.put(key, data)


BY = ("run", "worker", "host", "began", "seconds")
"""What an index entry says of how its part came to be: another thing each time."""
_ENTRY = re.compile(r"part-(\d+)(?:\.r([1-9]\d*))?\.i(\d+)\.e(\d+)\.b(\d+)\.json$")


class Entry(NamedTuple):
    """What the name of an index entry says of its part."""

    key: str
    images: int
    errors: int
    bytes: int


Entries = Mapping[PartId, Entry]


def index_entries(store: Store) -> dict[PartId, Entry]:
    """The index entry of each part, ascending, retries included, as `entry_that_counts` says: one listing, no reads.

    There may be a million: who asks several things of one moment lists once, and gives the entries to each function.
    """
    found: dict[PartId, Entry] = {}
    for key in store.list(PARTS):
        if match := _ENTRY.search(key):
            part, retry, images, errors, size = match.groups()
            id_, entry = PartId(int(part), int(retry or 0)), Entry(key, int(images), int(errors), int(size))
            if entry.images or id_ not in found:
                found[id_] = entry
    return {part: found[part] for part in sorted(found, key=attrgetter("index", "retry"))}


def parts_of_the_grid(entries: Entries) -> list[int]:
    """Those whose first rendering is committed."""
    return [part.index for part in entries if not part.retry]


def entries_by_part(store: Store) -> dict[PartId, list[str]]:
    found: dict[PartId, list[str]] = {}
    for key in store.list(PARTS):
        if match := _ENTRY.search(key):
            found.setdefault(PartId(int(match[1]), int(match[2] or 0)), []).append(key)
    return found


def entry_that_counts(keys: Iterable[str]) -> Entry:
    """Of several entries of one part the one with images: the other is of a worker that lost to it."""
    found = []
    for key in keys:
        match = _ENTRY.search(key)
        assert match is not None
        found.append(Entry(key, *(int(text) for text in match.groups()[2:])))
    return next((entry for entry in reversed(found) if entry.images), found[0])


@dataclass(frozen=True)
class Counts:
    """What an output holds. `errors`: samples that have no image by now."""

    parts_done: int
    images: int
    errors: int
    bytes: int


@dataclass(frozen=True)
class Totals(Counts):
    """`classes`: of the errors; `waived`: how many of them may stay so."""

    classes: dict[str, int]
    waived: int


def counts(entries: Entries) -> Counts:
    """By the names of the index alone."""
    return Counts(*_counted(entries))


def totals(store: Store, entries: Entries) -> Totals:
    """The entries that have errors are read, too, and the parts of which anything is waived. Raises Fatal for damaged ones."""
    return Totals(*_counted(entries), classes=error_classes(store, entries), waived=_waived(store, entries))


def _counted(entries: Entries) -> tuple[int, int, int, int]:
    return (
        sum(not part.retry for part in entries),
        sum(entry.images for entry in entries.values()),
        sum(-entry.images if part.retry else entry.errors for part, entry in entries.items()),
        sum(entry.bytes for entry in entries.values()),
    )


def _waived(store: Store, entries: Iterable[PartId]) -> int:
    if not (waivers := requests.waivers(store)):
        return 0
    layout = LAYOUTS[read_job(store)["output"]["layout"]]
    renderings: dict[int, int] = {}
    for part in entries:
        renderings[part.index] = max(renderings.get(part.index, 0), part.retry + 1)
    return sum(
        len(requests.waived(store, keys).keys() & ended(store, layout, index, renderings[index]).errors.keys())
        for index, keys in waivers.items()
        if index in renderings
    )


def open_retries(store: Store, entries: Entries | None = None) -> list[Retry]:
    """Requests that wait to be rendered, ascending; of each part the first one, and only where its rendering before is committed.

    `entries`: else the index is listed if there is any request. Raises Fatal for a damaged one.
    """
    waiting: dict[int, PartId] = {}
    asked = requests.asked(store)
    if entries is None:
        entries = index_entries(store) if asked else {}
    for part in asked:
        if part not in entries and PartId(part.index) in entries:
            waiting.setdefault(part.index, part)
    return [requests.read(store, part) for part in waiting.values()]


def is_as_committed(store: Store, entry: str, committed_sha256: str) -> bool:
    """Whether a part's commit object is the one that its index entry says. Raises KeyError or Fatal for an entry that cannot be read.

    Only a stored entry can tell: a part without one is found and entered again as it is.
    """
    said = _read_entry(store, entry).get("commit_sha256")
    if not isinstance(said, str) or not re.fullmatch("[0-9a-f]{64}", said):
        raise _damaged_entry(store, entry, "no commit_sha256")
    return said == committed_sha256


def counts_errors(store: Store, entry: str, part: Part, committed: Committed, superseded: dict[str, int]) -> bool:
    """Whether an entry says of what classes a part's errors are, and were. Raises as `is_as_committed` does."""
    receipt, said = _receipt(part, committed, superseded, adopted=True), _read_entry(store, entry)
    return bool(said.get("error_classes") == receipt.error_classes and said.get("superseded", {}) == superseded)


def committed_by(store: Store, entry: str) -> dict[str, Any]:
    """Who committed a part, and how long each stage took (see `stages`), as far as its entry says. Raises as `is_as_committed` does."""
    said = _read_entry(store, entry)
    return {name: said[name] for name in BY if name in said}


def error_classes(store: Store, entries: Entries) -> dict[str, int]:
    """How many samples have ended as an error of each class; reads the index entries that have any."""
    counts: Counter[str] = Counter()
    for part, entry in entries.items():
        if entry.errors:
            counts.update(_counts(store, entry.key, "error_classes"))
        if part.retry and (entry.errors or entry.images):
            counts.subtract(_counts(store, entry.key, "superseded"))
    return {name: count for name, count in counts.items() if count}


def _counts(store: Store, key: str, name: str) -> dict[str, int]:
    try:
        return {str(kind): int(count) for kind, count in _read_entry(store, key)[name].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise _damaged_entry(store, key, f"no {name}") from None


def _read_entry(store: Store, key: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(store.read(key))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _damaged_entry(store, key, "not JSON")
    return value


def _damaged_entry(store: Store, key: str, reason: str) -> Fatal:
    return Fatal(f"{store.url}/{key} is damaged ({reason}); `renderfarm run JOB --repair` writes it again from what it names")
