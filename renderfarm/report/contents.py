"""What the report says beside the pictures: how far the output is, its runs, where their time went, what failed. At a bounded cost,
since an output may have a hundred thousand parts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from renderfarm import commit, requests
from renderfarm.arguments import ARGUMENTS
from renderfarm.config import ManifestSpec
from renderfarm.errors import Fatal, InvalidInput
from renderfarm.frozen_rows import FOLDER as ROWS
from renderfarm.heartbeat import state_of
from renderfarm.manifest import EXTRA, ROW, open_manifest
from renderfarm.reading import Output
from renderfarm.records import PartId, SampleKey
from renderfarm.report.columnar import column, columns_of
from renderfarm.report.figures import figures
from renderfarm.report.gone import left_out
from renderfarm.samplers import SAMPLERS, find_sampler
from renderfarm.schema import output_name
from renderfarm.stages import STAGES

PARTS_SHOWN, RUNS_SHOWN, FAILURES_SHOWN, UNREAD_SHOWN = 2_000, 50, 5_000, 20
READERS = 8


def summary(output: Output, entries: commit.Entries) -> dict[str, Any]:
    """Counts are those of the index, so they are right even if no driver lives; the rest is of the last heartbeat, or the profile."""
    counts, progress, job = commit.counts(entries), commit.read_progress(output.store), output.job
    counted = figures(output.store, job["output"]["layout"], entries)
    try:
        parts: int | None = output.grid.count
    except Fatal:
        parts = None
    return {
        "name": progress.get("job"),
        "out": output.store.url,
        "state": state_of(progress, unfinished=parts is not None and counts.parts_done < parts),
        "rows": sum(file["rows"] for file in job["manifest"]["files"]),
        "parts": parts,
        "parts_done": counts.parts_done,
        "images": counts.images,
        "errors": counts.errors,
        "bytes": counts.bytes,
        "images_per_second": progress.get("images_per_second"),
        "error_classes": counted.error_classes,
        "kinds": {name: list(kinds.items())[:20] for name, kinds in counted.kinds.items()},
        "counted": counted.counted,
        "truncated": counted.truncated,
        "profile": counted.profile,
        "profiles": counted.profiles,
        "model": " at ".join(filter(None, (job["model"].get("id"), job["model"].get("revision")))),
        "layout": job["output"]["layout"],
        "format": job["output"].get("format"),
        "written": round(time.time()),
    }


def runs(output: Output, most: int = RUNS_SHOWN) -> list[dict[str, Any]]:
    """How the last runs ended, the latest first. Of one that an error ended less is known, and the `error`."""
    kept = (
        "run_id",
        "key",
        "logical_date",
        "state",
        "new_images",
        "new_errors",
        "seconds",
        "images_per_second",
        "useful_slots",
        "lost_workers",
        "copies",
    )
    found = []
    for key in sorted(output.store.list(commit.RUNS))[-most:][::-1]:
        with left_out():
            said = json.loads(output.store.read(key))
            found.append({name: said.get(name) for name in (*kept, "error")})
    return found


# ------------------------------------------------------------------------------------------------------- timeline


def timeline(output: Output, entries: commit.Entries) -> dict[str, Any]:
    """When which worker had which part, and how long each stage took, of the parts whose index entries say so: all of them, or some spread
    over the output. `of`: how many parts there are; `unread`: those whose entries are damaged."""
    chosen = list(entries.items())[:: max(1, -(-len(entries) // PARTS_SHOWN))]
    unread = list[PartId]()
    with ThreadPoolExecutor(READERS, thread_name_prefix="entries") as pool:
        found = list(pool.map(lambda entry: _part(output, entry[0], entry[1], unread), chosen))
    said = sorted((part for part in found if part is not None), key=lambda part: part["began"])
    shown = [str(part) for part in sorted(unread)[:UNREAD_SHOWN]]
    return {
        "parts": columns_of(said),
        "count": len(said),
        "of": len(entries),
        "stages": STAGES,
        "unread": shown,
        "unread_count": len(unread),
    }


def _part(output: Output, part: PartId, entry: commit.Entry, unread: list[PartId]) -> dict[str, Any] | None:
    """None for an entry that does not say: of a part whose committer died, or of an earlier version; or one that is damaged."""
    with left_out(say=lambda: unread.append(part)):
        said = commit.committed_by(output.store, entry.key)
        if "seconds" not in said:
            return None
        seconds = {stage: float(said["seconds"][stage]) for stage in STAGES}
        who = {"run": str(said["run"]), "worker": str(said["worker"]), "host": str(said["host"])}
        return {"part": str(part), **who, "began": float(said["began"]), **seconds, "images": entry.images, "errors": entry.errors}
    return None


# ------------------------------------------------------------------------------------------------------- failures


def failures(output: Output) -> dict[str, Any]:
    """The samples that have no image by now, as far as FAILURES_SHOWN. `count`: so many of them are here. `asked`: columns with what was
    asked of them, where the output holds its rows, as it does those of a sweep."""
    rows = list(_failed(output))
    names = ("row", "row_id", "image_index", "error_class", "error_message", "retryable", "waived")
    columns = [{"name": name, **column([row[name] for row in rows])} for name in names] if rows else []
    return {"columns": columns, "count": len(rows), "asked": columns_of(_asked(output, [row["row"] for row in rows]))}


def _asked(output: Output, rows: list[int]) -> list[dict[str, Any]]:
    """Each row's columns under the names that a table of images gives them, a null being what the job says."""
    said = output.job["manifest"]
    if not rows or "made" not in said:
        return []
    with left_out():
        file = f"{output.store.url}/{ROWS}/{said['files'][0]['path']}"
        manifest = open_manifest(ManifestSpec(path=file, columns=said["columns"]), frozenset(ARGUMENTS))
        tables = manifest.stream((row, row + 1) for row in sorted(set(rows)))
        found = {row[ROW]: _resolved(row, output.job["render"]) for table in tables for row in table.to_pylist()}
        return [found[row] for row in rows]
    return []


def _resolved(row: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    given = {output_name(name.removeprefix(EXTRA)) if name.startswith(EXTRA) else name: value for name, value in row.items()}
    given |= {name: value for name, value in defaults.items() if given.get(name) is None and not isinstance(value, list | dict)}
    with contextlib.suppress(InvalidInput):  # it may be why the row failed
        given["sampler"] = find_sampler(given["sampler"], SAMPLERS[defaults["sampler"]].kind).name
    return given


def _failed(output: Output) -> Iterator[dict[str, Any]]:
    left = FAILURES_SHOWN
    with left_out():
        waivers = requests.waivers(output.store)
        for index, table, _ in output.errors_by_part():
            waived = _waived(output, waivers.get(index, ()))
            for row in table.slice(0, left).to_pylist():
                yield {**row, "waived": SampleKey(row["row"], row["image_index"]) in waived}
            left -= min(left, len(table))
            if not left:
                return


def _waived(output: Output, names: Sequence[str]) -> dict[SampleKey, str | None]:
    with left_out():
        return requests.waived(output.store, names)
    return {}
