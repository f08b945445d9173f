"""The slot loop: B places, one denoiser call a step, samples come and go; no engine, no files, no torch.

    submit(samples) ─▶ queue per slot group ─▶ [ slot 0 | slot 1 | … | slot B-1 ] ─▶ decode ─▶ after ─▶ future

One thread, started here, does all work on the model, because a second torch thread slows the first. Loops in one
process take turns, a model's loading or one step each: loading changes what torch gives every thread (the default
dtype, how modules are made), so a model that computed meanwhile would give other pixels.

Steps, samplers, guidance and seeds mix in a batch; only the slot group (size, guidance on or off) separates. The group
with the most work goes first, so that partial batches wait for mates from later leases and filler comes only when
nothing else is left to do.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from renderfarm.errors import DeviceLost, InvalidInput, NonFiniteOutput, PromptTruncated, RenderFailed, RenderfarmError
from renderfarm.models.base import Counted, SlotModel
from renderfarm.records import Sample

NOT_COUNTED = Counted(0)
BROKEN_CONTEXT = ("CUDA error", "HIP error")
"""How torch's errors begin that a context does not survive. Too little memory is none of them: it is said otherwise."""


class _Turns:
    """A lock that is fair: threads have it in the order in which they asked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets = itertools.count()
        self._now = 0

    def __enter__(self) -> None:
        with self._changed:
            mine = next(self._tickets)
            self._changed.wait_for(lambda: self._now == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()


_TURNS = _Turns()


@dataclass(frozen=True)
class Rendered:
    """A finished sample: H×W×3 uint8 pixels, what the model read of its prompts, and the pixels as they were before
    `after`: the same ones where nothing is done to them. `entered`: when it came into a slot, by `time.monotonic`."""

    pixels: np.ndarray
    counted: Counted
    original: np.ndarray
    entered: float | None = None


@dataclass
class Counters:
    """`useful_slots / total_slots` is the share of denoiser work that was not filler; `slot_groups`: the most that had work at once."""

    denoiser_calls: int = 0
    useful_slots: int = 0
    total_slots: int = 0
    slot_groups: int = 0
    encoded_texts: int = 0


@dataclass(eq=False)
class _Job:
    sample: Sample
    future: Future[Rendered]
    counted: Counted = NOT_COUNTED
    state: Any = None
    entered: float | None = None


@dataclass
class _Group:
    waiting: deque[_Job] = field(default_factory=deque)
    active: list[_Job] = field(default_factory=list)

    def work(self) -> int:
        return len(self.waiting) + len(self.active)


class SlotLoop:
    """Owns the model and the one thread that touches it. `after`: what that thread does to a picture that is decoded."""

    def __init__(
        self,
        load: Callable[[], SlotModel],
        on_truncation: Literal["record", "error"] = "record",
        after: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    ) -> None:
        self.on_truncation, self._after = on_truncation, after
        self.counters = Counters()
        self.ready: Future[SlotModel] = Future()
        self._inbox: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._unfinished: set[_Job] = set()
        self._groups: dict[Hashable, _Group] = {}
        self._embeddings: OrderedDict[Hashable, Any] = OrderedDict()
        self._tried: dict[Hashable, list[int]] = {}
        self._thread = threading.Thread(target=self._run, args=(load,), name="render", daemon=True)
        self._thread.start()

    def submit(self, samples: Sequence[Sample]) -> list[Future[Rendered]]:
        """Queue samples; each future ends with a `Rendered` or a RenderfarmError."""
        jobs = [_Job(sample, Future()) for sample in samples]
        for job in jobs:
            self._unfinished.add(job)
            job.future.add_done_callback(lambda _, job=job: self._unfinished.discard(job))  # type: ignore[misc]
        if jobs:
            self._inbox.put(jobs)
        return [job.future for job in jobs]

    def close(self) -> None:
        """Let queued work finish, then end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self, load: Callable[[], SlotModel]) -> None:
        try:
            with _TURNS:
                self._model = load()
        except BaseException as error:  # whatever loading raises belongs to whoever waits for the model
            self.ready.set_exception(error)
            self._give_up(error)
            return
        self.ready.set_result(self._model)
        try:
            open_ = True
            while open_ or self._groups:
                open_ = self._take_in(open_)
                if self._groups:
                    with _TURNS:
                        self._advance()
        except BaseException as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """Nothing will be rendered any more, and nobody may wait for it: leases end with the error until the loop is closed."""
        jobs: list[_Job] | None = list(self._unfinished)
        while jobs is not None:
            for job in jobs:
                if not job.future.done():  # twice where it was in the inbox as well; not a sample's own end, so it is not wrapped as one
                    why = error if isinstance(error, DeviceLost) else RuntimeError(f"the render thread ended: {_said(error)}")
                    job.future.set_exception(why)
            jobs = self._inbox.get()

    def _take_in(self, open_: bool) -> bool:
        """Move new jobs into their groups; wait for some only if there is nothing else to do."""
        while open_:
            try:
                jobs = self._inbox.get(block=not self._groups)
            except queue.Empty:
                return True
            if jobs is None:
                return False
            for job in jobs:
                try:
                    self._groups.setdefault(self._model.slot_group(job.sample), _Group()).waiting.append(job)
                except Exception as error:  # as below, for one sample
                    _fail([job], error)
            self.counters.slot_groups = max(self.counters.slot_groups, len(self._groups))
        return False

    def _advance(self) -> None:
        """One step of the group that fills most slots; among equals the one that is on its way."""
        key = max(self._groups, key=lambda k: (min(self._groups[k].work(), self._model.batch_size), len(self._groups[k].active)))
        group = self._groups[key]
        self._fill(group)
        if group.active:
            self._step(group)
        if not group.work():
            del self._groups[key]

    def _fill(self, group: _Group) -> None:
        free = self._model.batch_size - len(group.active)
        entering = [group.waiting.popleft() for _ in range(min(free, len(group.waiting)))]
        if not entering:
            return
        now = time.monotonic()
        for job in entering:
            job.entered = job.entered or now  # one that starts again (`_fail_or_part`) has been at it since
        try:
            self._encode(entering, group.waiting)
        except Exception as error:  # one boundary for what torch may raise: samples fail, the loop goes on
            self._fail_or_part(entering, error)
            return
        for job in entering:
            try:
                self._check_truncation(job)
                self._check_places(job.sample)
                job.state = self._model.start(job.sample, [self._embeddings[t] for t in self._model.texts(job.sample)])
                group.active.append(job)
            except Exception as error:  # as above, for one sample
                _fail([job], error)

    def _check_truncation(self, job: _Job) -> None:
        job.counted = counted = self._model.count_tokens(job.sample)
        if self.on_truncation == "record":
            return
        if counted.cut_off is not None:
            raise PromptTruncated(
                f"the prompt has {counted.tokens} tokens; the model would not see its end: {counted.cut_off!r}; shorten it"
            )
        if counted.negative_cut_off is not None:
            raise PromptTruncated(f"the model would not see the end of the negative prompt: {counted.negative_cut_off!r}; shorten it")

    def _check_places(self, sample: Sample) -> None:
        """Tried once for each shape: where a place in the batch decides pixels, an error is better than such a picture."""
        if (shape := self._model.shape(sample)) is None:
            return
        if shape not in self._tried:
            self._tried[shape] = self._model.places_that_differ(sample)
        if places := self._tried[shape]:
            raise InvalidInput(
                f"at {sample.width}×{sample.height} pixels and guidance_scale {sample.guidance_scale:g} the denoiser gives a sample "
                f"other bits at {len(places)} of {self._model.batch_size} places of its batch on this device, so the row would not keep "
                "its pixels; give it another size, or, in a new output, another workers.batch_size (1 always works), or "
                "workers.threads: 1 on a CPU"
            )

    def _encode(self, entering: list[_Job], waiting: deque[_Job]) -> None:
        """Have the embeddings of all entering samples cached; fill the last chunk of B with texts needed soon."""
        size = self._model.batch_size
        needed = list(dict.fromkeys(text for job in entering for text in self._model.texts(job.sample)))
        missing = [text for text in needed if text not in self._embeddings]
        if missing:
            missing += itertools.islice(self._needed_later(waiting, set(missing)), -len(missing) % size)
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            self._embeddings.update(zip(chunk, self._model.encode_texts(chunk), strict=True))
            self.counters.encoded_texts += len(chunk)
        for text in needed:
            self._embeddings.move_to_end(text)
        while len(self._embeddings) > max(self._model.cached_texts, len(needed)):
            self._embeddings.popitem(last=False)

    def _needed_later(self, waiting: deque[_Job], but: set[Hashable]) -> Iterator[Hashable]:
        """Texts of samples that wait which nobody has encoded, each once: those of a sweep may be a prompt's hundred seeds away."""
        for job in waiting:
            for text in self._model.texts(job.sample):
                if text not in but and text not in self._embeddings:
                    but.add(text)
                    yield text

    def _step(self, group: _Group) -> None:
        try:
            finished = self._model.step([job.state for job in group.active])
        except Exception as error:  # as above
            blamed, group.active = group.active, []
            self._fail_or_part(blamed, error)
            return
        self.counters.denoiser_calls += 1
        self.counters.useful_slots += len(group.active)
        self.counters.total_slots += self._model.batch_size
        done = [job for job, is_finished in zip(group.active, finished, strict=True) if is_finished]
        group.active = [job for job, is_finished in zip(group.active, finished, strict=True) if not is_finished]
        for job in done:
            try:
                pixels = self._model.decode(job.state)
                if not pixels.any():
                    raise NonFiniteOutput(
                        "the picture is wholly black, as an overflow or a hidden filter leaves it; "
                        "try workers.dtype: float32, or another seed or prompt"
                    )
                job.future.set_result(Rendered(self._after(pixels), job.counted, pixels, job.entered))
            except Exception as error:  # as above, for one sample
                _fail([job], error)

    def _fail_or_part(self, jobs: list[_Job], error: Exception) -> None:
        """Which of several samples is to blame cannot be known: each starts again in a group of its own, and only one
        that fails alone has failed. B is constant, so its pixels are the same without mates."""
        _end_if_lost(error)
        if len(jobs) == 1:
            _fail(jobs, error)
            return
        for job in jobs:
            job.state = None
            self._groups[job] = _Group(waiting=deque([job]))


def _end_if_lost(error: Exception) -> None:
    """A broken context fails every sample after the one that broke it; only another process gets a new one."""
    if any(sign in str(error) for sign in BROKEN_CONTEXT):
        raise DeviceLost(_said(error)) from error


def _fail(jobs: list[_Job], error: Exception) -> None:
    _end_if_lost(error)
    if not isinstance(error, RenderfarmError):
        original, error = error, RenderFailed(_said(error))
        error.__cause__ = original
    for job in jobs:
        job.future.set_exception(error)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
