"""The job's `after`: what is done to a picture once it is rendered.

    decode ─▶ [ steps up to the last network: render thread ] ─▶ future ─▶ [ the other steps: encoder threads ] ─▶ encode

Networks are torch's work, and all of that belongs to the render thread; what Pillow does need not keep it waiting.
Each step sees one picture, so it depends on nothing but that picture and the step.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from renderfarm.adapters import check_sha256, read_file, read_weights, sha256
from renderfarm.config import STEP_FILES, RestoreFaces, Step
from renderfarm.errors import Fatal, InvalidJob, NonFiniteOutput, RenderFailed, RenderfarmError
from renderfarm.faces import Detector, check_detector
from renderfarm.models.networks import identify, identify_face
from renderfarm.retouch import colour, write_on

HOOKS = "renderfarm.watermarks"
TRIAL_PX = 256

Work = Callable[[np.ndarray], np.ndarray]

# Of each step's files: raises ValueError, with the reason, for what the step cannot use
CHECKS: dict[tuple[str, str], Callable[[bytes], Any]] = {
    ("upscale", "weights"): identify,
    ("restore_faces", "weights"): identify_face,
    ("restore_faces", "detector"): check_detector,
}


# ---------------------------------------------------------------------------------------------- before a worker starts


def read_steps(steps: Iterable[Step]) -> tuple[tuple[Step, ...], dict[str, bytes]]:
    """The steps with the hashes of their files, and those files by hash. Raises InvalidJob for steps that cannot work."""
    read, files = [], dict[str, bytes]()
    for number, step in enumerate(steps):
        at = f"after[{number}].{step.kind}"
        for field, hashed in STEP_FILES.get(step.kind, {}).items():
            data = _read(at, field, step)
            files[sha256(data)] = data
            named = getattr(step, step.kind).model_copy(update={hashed: sha256(data)})
            step = step.model_copy(update={step.kind: named})
        if step.watermark is not None and step.watermark.hook is not None:
            find_hook(step.watermark.hook)
        read.append(step)
    return tuple(read), files


def _read(at: str, field: str, step: Step) -> bytes:
    """A file that a step names, if it is what the step needs and the job asks for."""
    given = getattr(step, step.kind)
    path, wanted = getattr(given, field), getattr(given, STEP_FILES[step.kind][field])
    if field == "detector":
        data = read_file(f"{at}.{field}", path, ".onnx", "give it YuNet as OpenCV publishes it")
    else:
        data = read_weights(f"{at}.{field}", path)
    check_sha256(at, path, data, wanted)
    try:
        CHECKS[step.kind, field](data)
    except ValueError as error:
        raise InvalidJob(f"{at}: {path} {error}") from None
    return data


def scale(files: dict[str, bytes], steps: Iterable[Step]) -> int:
    """How many times as wide the steps make a picture."""
    made = 1
    for step in steps:
        if step.upscale is not None and step.upscale.sha256 is not None:
            made *= identify(files[step.upscale.sha256]).scale
    return made


def frozen(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """The steps as JSON: what decides pixels, so files by their hash and not by their place."""
    places = {kind: set(fields) for kind, fields in STEP_FILES.items()}
    return [step.model_dump(exclude=places, exclude_none=True) for step in steps]


def thawed(stored: Iterable[dict[str, Any]]) -> tuple[Step, ...]:
    """The steps that `frozen` gave, or the profile, which says more of each. Files are named by their hash."""
    stored = [{kind: step[kind] for kind in Step.model_fields if kind in step} for step in stored]
    return tuple(Step.model_validate({kind: _thawed(kind, given) for kind, given in step.items()}) for step in stored)


def _thawed(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    places = {field: given[hashed] for field, hashed in STEP_FILES.get(kind, {}).items()}
    return places | ({"tile": None} if kind == "upscale" else {}) | given  # a None is not stored, and is no default


def find_hook(name: str) -> EntryPoint:
    """The function that an installed package offers under this name. Raises InvalidJob; runs none of that package's code."""
    found = list(entry_points(group=HOOKS, name=name))
    if len(found) == 1:
        return found[0]
    offered = ", ".join(sorted({point.name for point in entry_points(group=HOOKS)})) or "none"
    how_many = "no installed package offers" if not found else f"{len(found)} installed packages offer"
    raise InvalidJob(f"watermark.hook: {how_many} {name!r} among its entry points {HOOKS!r} (here: {offered}); install the one you mean")


# ---------------------------------------------------------------------------------------------- in a worker


class Chain:
    """A job's steps at work in one worker."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self._names = [f"after[{number}].{step.kind}" for number, step in enumerate(steps)]
        self._last_network = max((number for number, step in enumerate(steps, 1) if step.kind in STEP_FILES), default=0)
        self._work: list[Work] = []
        self._details: list[dict[str, Any]] = []

    def load(self, read: Callable[[str], bytes], device: str, dtype: str) -> None:
        """In the render thread. `read` gives weights by their SHA-256. Raises Fatal where a step cannot work here."""
        for name, step in zip(self._names, self.steps, strict=True):
            try:
                work, details = _make(step, read, device, dtype)
            except RenderfarmError:
                raise
            except Exception as error:  # one boundary for what torch, safetensors and other people's packages may raise
                raise Fatal(f"{name}: cannot be set up: {type(error).__name__}: {error}") from error
            self._work.append(work)
            self._details.append(details)

    def profile(self) -> dict[str, Any]:
        """What decides pixels beside the model's own profile; empty where there is no step."""
        if not self.steps:
            return {}
        described = [step | more for step, more in zip(frozen(self.steps), self._details, strict=True)]
        return {"after": described, "pillow": version("pillow")}

    def in_render_thread(self, pixels: np.ndarray) -> np.ndarray:
        """All up to the last network. Raises RenderfarmErrors, which are the sample's end."""
        return self._run(pixels, range(self._last_network))

    def beside(self, pixels: np.ndarray) -> np.ndarray:
        """The rest, in any thread; raises the same."""
        return self._run(pixels, range(self._last_network, len(self.steps)))

    def _run(self, pixels: np.ndarray, numbers: range) -> np.ndarray:
        for number in numbers:
            name = self._names[number]
            try:
                pixels = self._work[number](pixels)
            except RenderfarmError as error:
                raise type(error)(f"{name}: {error}") from error
            except Exception as error:  # as in `load`, for one picture
                raise RenderFailed(f"{name}: {type(error).__name__}: {error}") from error
            if not pixels.any():
                raise NonFiniteOutput(f"{name}: the picture is wholly black after it; change the step, or leave the row out")
        return pixels


def _make(step: Step, read: Callable[[str], bytes], device: str, dtype: str) -> tuple[Work, dict[str, Any]]:
    """A step's function, and what its render profile says beside the step itself."""
    if step.upscale is not None:
        from renderfarm.models.upscaler import Upscaler  # torch

        assert step.upscale.sha256 is not None
        data = read(step.upscale.sha256)
        network = identify(data)
        return Upscaler(data, network, step.upscale.tile, device, dtype), {"network": vars(network)}
    if step.restore_faces is not None:
        return _restorer(step.restore_faces, read, device)
    if step.colour is not None:
        wanted = step.colour
        return lambda pixels: colour(pixels, wanted), {}
    assert step.watermark is not None
    if step.watermark.hook is not None:
        return _hooked(find_hook(step.watermark.hook))
    text, opacity = step.watermark.text, step.watermark.opacity
    assert text is not None
    return lambda pixels: write_on(pixels, text, opacity), {"freetype": features.version("freetype2")}


def _restorer(step: RestoreFaces, read: Callable[[str], bytes], device: str) -> tuple[Work, dict[str, Any]]:
    from renderfarm.models.restorer import FaceRestorer  # torch

    assert step.sha256 is not None
    assert step.detector_sha256 is not None
    data, detector = read(step.sha256), Detector(read(step.detector_sha256))
    network = identify_face(data)
    return FaceRestorer(data, network, detector, step.strength, device), {"network": vars(network), **detector.profile()}


def _hooked(point: EntryPoint) -> tuple[Work, dict[str, Any]]:
    """Other people's function: on a copy, by one thread at a time, and only if it gives the same bits twice."""
    mark, lock = point.load(), threading.Lock()

    def work(pixels: np.ndarray) -> np.ndarray:
        with lock:
            made = mark(pixels.copy())
        if not isinstance(made, np.ndarray) or made.shape != pixels.shape or made.dtype != np.uint8:
            raise TypeError(f"{point.value} must give an H×W×3 uint8 array of its picture's shape")
        return made

    trial = np.indices((TRIAL_PX, TRIAL_PX)).sum(0, dtype=np.uint8)[..., None].repeat(3, 2)
    if not np.array_equal(work(trial), work(trial)):
        raise Fatal(
            f"watermark.hook {point.name!r}: {point.value} gives a picture other bits the second time, so rows would not keep theirs"
        )
    source = find_spec(point.module)
    code = Path(source.origin).read_bytes() if source is not None and source.origin and Path(source.origin).is_file() else b""
    package = {"package": point.dist.name, "version": point.dist.version} if point.dist is not None else {}
    return work, {"hook": {"function": point.value, **package, "module_sha256": hashlib.sha256(code).hexdigest()}}
