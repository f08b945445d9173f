"""One lease, start to end: rows → samples → pixels → pictures → files → one commit per part.

A worker holds one `SlotLoop` and a small pool of threads that encode and put images beside it. Several leases may be
in `render` at once (each in a thread of its own), so that the slots stay full while one part is being published.
No engine appears here: `engines.inline` calls it in this process, `engines.ray` in an actor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from renderfarm import adapters, commit, requests
from renderfarm.after import Chain
from renderfarm.config import Job
from renderfarm.encode import FORMATS, ORIGINALS, Written, encode, encoder_of, pixel_sha256
from renderfarm.errors import Fatal, InvalidInput, RenderfarmError, WorkerCrashed, WorkerLost
from renderfarm.inputs import Fetcher
from renderfarm.layouts import LAYOUTS
from renderfarm.layouts.base import PartWriter, name_of, original_key
from renderfarm.manifest import EXTRA, ROW
from renderfarm.marks import Marks, marks
from renderfarm.models.allocator import give_back_memory
from renderfarm.models.base import SlotModel
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.load import load_model
from renderfarm.models.measure import best_batch_size, check_attention, check_places, seconds_per_image
from renderfarm.pictures import shown
from renderfarm.records import IMAGE_ARGUMENTS, Lease, Part, PartReceipt, Receipt, RowError, Sample, SampleKey, WorkerReady
from renderfarm.samples import Usual, expand_rows, given_names, row_error
from renderfarm.schema import ERROR_COLUMNS, image_columns, output_name
from renderfarm.signing import Sign, signer
from renderfarm.slots import Rendered, SlotLoop
from renderfarm.stages import Stopwatch
from renderfarm.storage import open_store

ENCODERS = 2
ENCODERS_STEP_BACK = 5  # in nice's units: a third of the others' share
LEASES_IN_FLIGHT = 3
MOST_LEASES = 64  # of small parts
MOST_GROUPS = 8  # that leases are held for: what is in flight is what a crash costs

KILLER = "the workers that rendered this row died each time; look at its arguments, or at the device's memory"


def leases_held(batch_size: int, images_per_part: float, slot_groups: int = 1) -> int:
    """How many leases keep a worker's slots full: while one is published the others must hold a batch and its successor of each slot
    group, beside as many samples that are finished and wait for others of their part."""
    images = (1 + 2 * min(slot_groups, MOST_GROUPS)) * batch_size
    return min(MOST_LEASES, max(LEASES_IN_FLIGHT, 1 + math.ceil(images / images_per_part)))


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs to know, small enough to send."""

    name: str
    job: Job
    model: ModelInfo
    usual: Usual
    run_id: str = ""


class Worker:
    """Loads the model at once, in its render thread; `ready` waits for it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec, self.job = spec, spec.job
        self.store = open_store(self.job.output.path, single_writer=self.job.output.single_writer)
        self.layout = LAYOUTS[self.job.output.layout]
        self.started = time.monotonic()
        self.chain = Chain(self.job.after)
        output = self.job.output
        self.written = Written(output.format, output.encoding.settled(output.format), signed=output.c2pa is not None)
        self.encoder = encoder_of(self.written.format)
        # what `_load` may set, which begins with the slots
        self.sign: Sign | None = None
        self.seconds_per_image: float | None = None
        self.slots = SlotLoop(self._load, self.job.render.on_truncation, self.chain.in_render_thread)
        self.encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode", initializer=_step_back)
        self.profile_sha256 = ""

    def ready(self) -> WorkerReady:
        """Wait until the pipeline is loaded and publish or match the render profile."""
        _import_what_leases_need()
        model, after = self.slots.ready.result(), self.chain.profile()
        record_others = self.job.workers.other_profiles == "record"
        self.profile_sha256 = commit.publish_profile(self.store, model.profile() | after, record_others=record_others)
        return WorkerReady(
            worker=self.spec.name,
            profile_sha256=self.profile_sha256,
            device=model.device,
            load_seconds=time.monotonic() - self.started,
            batch_size=model.batch_size,
            seconds_per_image=self.seconds_per_image,
        )

    def _load(self) -> SlotModel:
        if self.job.output.c2pa is not None:
            self.sign = signer(self.job.output.c2pa)
        model = load_model(self.spec.model, self.job.workers)
        self.chain.load(partial(commit.kept, self.store), model.device, self.job.workers.dtype)
        if (backend := self.job.workers.attention_backend) is not None:
            check_attention(model, self.spec.usual.sample, backend)
        if self.job.workers.batch_size == "auto":
            self._choose_batch_size(model)
        if self.job.output.part_rows == "auto" and not self.store.exists(commit.GRID):
            self.seconds_per_image = seconds_per_image(model, self.spec.usual.sample, self.chain.in_render_thread)
        check_places(model, self.spec.usual.sample)
        give_back_memory()  # what loading and trying took and does not need any more
        return model

    def _choose_batch_size(self, model: SlotModel) -> None:
        """The output's B; of workers that measure it at the same time, the first one's counts."""
        if not commit.has_profile(self.store):
            best_batch_size(model, self.spec.usual.sample)
            check_places(model, self.spec.usual.sample)  # before it is everybody's
        model.batch_size = commit.first_profile(self.store, model.profile() | self.chain.profile())["batch_size"]

    def render(self, lease: Lease) -> Receipt:
        """Render and commit every part of a lease that nobody has committed."""
        started, before = time.monotonic(), self.slots.counters.denoiser_calls
        receipts = tuple(self._render_part(part, lease) for part in lease.parts)
        counters = self.slots.counters
        return Receipt(
            lease=lease.number,
            parts=receipts,
            seconds=time.monotonic() - started,
            denoiser_calls=counters.denoiser_calls - before,
            useful_slots=counters.useful_slots,
            total_slots=counters.total_slots,
            slot_groups=counters.slot_groups,
        )

    def close(self) -> None:
        self.slots.close()
        self.encoders.shutdown()
        give_back_memory()  # a notebook's process goes on

    def _render_part(self, part: Part, lease: Lease) -> PartReceipt:
        if found := commit.find_commit(self.store, self.layout, part):
            return found
        watch = Stopwatch()
        before = commit.ended(self.store, self.layout, part.index, part.retry) if part.retry else None
        ordinals = lease.rows.column(ROW)
        rows = lease.rows.filter(pc.and_(pc.greater_equal(ordinals, part.start), pc.less(ordinals, part.stop)))
        samples: list[Sample] = []
        errors: list[RowError] = []
        for row in expand_rows(rows, self.job, self.spec.model):
            errors += row.errors
            if row.ordinal in lease.killers:
                errors += [row_error(s.key, s.row_id, s.prompt, WorkerCrashed(KILLER)) for s in row.samples]
            else:
                samples += row.samples
        if before is not None and lease.only is not None:
            samples, errors = _only(part, lease.only, before, samples, errors)
        planned = sorted([*(s.key for s in samples), *(e.key for e in errors)])
        if lease.announce_as is None:
            samples, unusable = self._with_images(samples)
            errors += unusable
        watch.prepared()

        records: list[dict[str, Any]] = []
        with self.layout.writer(self.store, part) as writer:
            for outcome in self._render_samples(part, writer, samples, lease.announce_as, watch):
                result = outcome.result()
                if isinstance(result, RowError):
                    errors.append(result)
                else:
                    records.append(result)
            ended = sorted([*(SampleKey(r["row"], r["image_index"]) for r in records), *(e.key for e in errors)])
            assert ended == planned, f"{part.name}: samples planned and ended differ; nothing was committed"
            images = self._image_table(records, rows)
            watch.encoded()
            by = {"worker": self.spec.name, "run": self.spec.run_id, "host": platform.node()}
            return commit.publish(self.store, self.layout, part, writer, images, _error_table(errors), lambda: by | watch.entry())

    def _with_images(self, samples: list[Sample]) -> tuple[list[Sample], list[RowError]]:
        """Samples with their images; errors for those whose images are of no use."""
        if not self.spec.model.images:
            return samples, []
        found = list(zip(samples, Fetcher(self.job.inputs, self.spec.model, self.store).fetch(samples), strict=True))
        unusable = [row_error(s.key, s.row_id, s.prompt, error) for s, error in found if isinstance(error, RenderfarmError)]
        return [sample for _, sample in found if isinstance(sample, Sample)], unusable

    def _render_samples(
        self, part: Part, writer: PartWriter, samples: list[Sample], announce_as: str | None, watch: Stopwatch
    ) -> Iterator[Future[dict[str, Any] | RowError]]:
        """An outcome per sample: all at once, or row by row with an announcement that survives the worker's death."""
        if announce_as is None:
            yield from self._put_when_rendered(part, writer, samples, watch)
            return
        for sample in samples:
            commit.announce(self.store, part, sample.key.row, announce_as)
            ready, unusable = self._with_images([sample])  # a picture may be the killer, too
            for error in unusable:
                ended: Future[dict[str, Any] | RowError] = Future()
                ended.set_result(error)
                yield ended
            for outcome in self._put_when_rendered(part, writer, ready, watch):
                wait([outcome])
                yield outcome

    def _put_when_rendered(
        self, part: Part, writer: PartWriter, samples: list[Sample], watch: Stopwatch
    ) -> list[Future[dict[str, Any] | RowError]]:
        outcomes = []
        for sample, rendered in zip(samples, self.slots.submit(samples), strict=True):
            rendered.add_done_callback(watch.rendered)
            outcomes.append(self._put(part, writer, sample, rendered))
        return outcomes

    def _put(self, part: Part, writer: PartWriter, sample: Sample, rendered: Future[Rendered]) -> Future[dict[str, Any] | RowError]:
        """Finish, encode and put the image in the pool as soon as its pixels are there."""
        outcome: Future[dict[str, Any] | RowError] = Future()

        def finish() -> None:
            try:
                try:
                    picture = self.chain.beside(rendered.result().pixels)
                except WorkerLost:
                    raise
                except RenderfarmError as error:  # the sample's own end; a store's error, below, is the lease's
                    outcome.set_result(row_error(sample.key, sample.row_id, sample.prompt, error))
                    return
                try:
                    outcome.set_result(self._put_image(part, writer, sample, picture, rendered.result()))
                except InvalidInput as error:  # no file of this format holds it
                    outcome.set_result(row_error(sample.key, sample.row_id, sample.prompt, error))
            except BaseException as error:  # must reach the lease: an unset future would wait for ever
                outcome.set_exception(error)

        rendered.add_done_callback(lambda _: self.encoders.submit(finish))
        return outcome

    def _put_image(self, part: Part, writer: PartWriter, sample: Sample, picture: np.ndarray, rendered: Rendered) -> dict[str, Any]:
        """`picture`: what `after` has made of what was rendered."""
        record = self._record(sample, picture, rendered)
        said = marks(record, self.job.output.metadata)
        image = encode(picture, self.written.format, self.written.encoding, said, self.sign)
        name = name_of(sample.key, image.file_sha256, FORMATS[self.written.format].extension)
        writer.add(name, image.data)
        columns = {"file_name": name, "bytes": len(image.data), "file_sha256": image.file_sha256}
        return record | columns | self._original(part, sample, rendered.original, said)

    def _record(self, sample: Sample, picture: np.ndarray, rendered: Rendered) -> dict[str, Any]:
        """An image's row of the table, as far as it is known before there is a file."""
        return {
            **{f.name: getattr(sample, f.name) for f in dataclasses.fields(sample) if f.name not in ("key", *IMAGE_ARGUMENTS)},
            **_inputs(sample),
            # a row that wants none of the job's says so, or its table would ask for them when it is a manifest
            "adapters": sample.adapters or (adapters.OFF if self.job.render.adapters else None),
            "row": sample.key.row,
            "image_index": sample.key.image_index,
            "model": self.spec.model.name,
            "model_revision": self.spec.model.revision,
            "profile_sha256": self.profile_sha256,
            **rendered.counted.columns(),
            "format": self.written.format,
            "encoder": self.encoder,
            "pixel_sha256": pixel_sha256(picture),
            "file_height": picture.shape[0],
            "file_width": picture.shape[1],
        }

    def _original(self, part: Part, sample: Sample, pixels: np.ndarray, said: Marks) -> dict[str, Any]:
        """The columns about a picture as it was before `after`; with `keep_originals` they name its file."""
        if not self.job.output.keep_originals:
            return {"original_pixel_sha256": pixel_sha256(pixels)} if self.job.after else {}
        image = encode(pixels, ORIGINALS, marks=said.of_its_origin())
        key = original_key(part, name_of(sample.key, image.file_sha256, FORMATS[ORIGINALS].extension))
        self.store.put(key, image.data)
        columns = {"bytes": len(image.data), "file_sha256": image.file_sha256, "pixel_sha256": image.pixel_sha256}
        return {"original_file": key, **{f"original_{name}": value for name, value in columns.items()}}

    def _image_table(self, records: list[dict[str, Any]], rows: pa.Table) -> pa.Table:
        """Our columns, sorted by sample, then the manifest's own for each row."""
        records = sorted(records, key=lambda record: (record["row"], record["image_index"]))
        given = given_names(self.job, self.spec.model, rows.column_names)
        table = pa.Table.from_pylist(records, schema=image_columns(given))
        place = {ordinal: index for index, ordinal in enumerate(rows.column(ROW).to_pylist())}
        source = rows.take(pa.array([place[record["row"]] for record in records], pa.int64()))
        for name in source.column_names:
            if name.startswith(EXTRA):
                table = table.append_column(output_name(name.removeprefix(EXTRA)), source.column(name))
        return table.combine_chunks()


def _step_back() -> None:
    """An encoder's thread: where cores are few, the thread that feeds the device comes first. Only Linux has priorities of threads."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # else the pool would take no work
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + ENCODERS_STEP_BACK)


def _import_what_leases_need() -> None:
    """While the model loads, beside it: pyarrow imports pandas (where that is installed) with its first array, Pillow its formats with the
    first picture. That took an eighth of a second, and more, of the first lease."""
    pa.array([0])
    Image.preinit()


def _only(
    part: Part, asked: frozenset[SampleKey], before: commit.Ended, samples: list[Sample], errors: list[RowError]
) -> tuple[list[Sample], list[RowError]]:
    """Of a retry, what is asked for and has no image yet: a rendering before it may have been made again since."""
    if unknown := asked - {*(s.key for s in samples), *(e.key for e in errors)}:
        first = min(unknown)
        raise Fatal(
            f"{part.name}: row {first.row}, image {first.image_index} is asked for, and the manifest does not have it; remove "
            f"{requests.key(part.id)}, and `renderfarm retry` asks again for what failed"
        )
    wanted = asked & before.errors.keys()
    return [s for s in samples if s.key in wanted], [e for e in errors if e.key in wanted]


def _inputs(sample: Sample) -> dict[str, str | None]:
    given = {name: image for name in IMAGE_ARGUMENTS if (image := getattr(sample, name)) is not None}
    sources = {f"init_{name}": image.source and shown(image.source) for name, image in given.items()}
    return sources | {f"init_{name}_sha256": image.sha256 for name, image in given.items()}


def _error_table(errors: list[RowError]) -> pa.Table:
    rows = [{**vars(error), "row": error.key.row, "image_index": error.key.image_index} for error in sorted(errors, key=lambda e: e.key)]
    for row in rows:
        del row["key"]
    return pa.Table.from_pylist(rows, schema=ERROR_COLUMNS)
