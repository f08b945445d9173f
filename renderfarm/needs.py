"""`renderfarm models --job`: the memory that a job's weights need in each worker, counted without them.

What a batch needs beside them follows from kernels and allocator, so it is measured by rendering and not guessed here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renderfarm.config import Job, Quantization, Step, several_devices
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.files import SAFETY
from renderfarm.models.load import prepare_libraries
from renderfarm.models.networks import FaceNetwork, Network, identify, identify_face
from renderfarm.preparation import Prepared

if TYPE_CHECKING:
    from renderfarm.models.sizes import Weights

MEBI = 1 << 20
ADAPTER, STEP = "adapter ", "after "  # before the name of what is no component


@dataclass(frozen=True)
class Parts:
    """Bytes of what a worker loads, by name: each pipeline's components (the second one's as `refiner/unet`), adapters, networks of
    `after`. `layers`: the same of the largest layer of each. `not_counted`: what is missing there, or stands too high, and why."""

    components: Mapping[str, int]
    layers: Mapping[str, int]
    beside: Mapping[str, int]
    not_counted: Mapping[str, str]

    @property
    def total(self) -> int:
        return sum(self.components.values()) + sum(self.beside.values())


def needs(prepared: Prepared) -> dict[str, Any]:
    """What is known before rendering. Sizes in MiB, rounded up."""
    job, model = prepared.job, prepared.model
    found: dict[str, Any] = {"job": job.name, "model": job.model.id, "task": model.task, "dtype": job.workers.dtype}
    if model.folder is None:
        return found | {"weights (MiB)": {}, "weights together (MiB)": 0, "beside them": "little: it draws without torch"}
    parts = parts_of(prepared)
    held, reason = held_at_once(parts, prepared)
    shared = workers_of_a_device(job)
    place = "in the machine's memory" if job.workers.device == "cpu" else "on each device"
    found |= {
        "weights (MiB)": {name: _mebibytes(size) for name, size in {**parts.components, **parts.beside}.items()},
        "weights together (MiB)": _mebibytes(parts.total),
        f"{place} (MiB)": _mebibytes(held * shared),
        f"{place} is": reason + (f", for each of the {shared} workers that share a device" if shared > 1 else ""),
    }
    if job.workers.offload != "none":
        found["in the machine's memory (MiB)"] = _mebibytes(parts.total * shared)
    if parts.not_counted:
        found["not counted"] = dict(parts.not_counted)
    return found | {"beside them": _beside(job, model)}


def _beside(job: Job, model: ModelInfo) -> str:
    height, width = job.render.height or model.height, job.render.width or model.width
    size = "a batch" if job.workers.batch_size == "auto" else f"a batch of {job.workers.batch_size}"
    advice = (
        "the first worker measures which batch fits"
        if job.workers.batch_size == "auto"
        else "workers.batch_size: auto has the first worker measure which one fits"
    )
    return f"what {size} at {width}×{height} pixels needs, and torch's own share, only rendering tells; {advice}"


def _mebibytes(size: int) -> int:
    return math.ceil(size / MEBI)


# ---------------------------------------------------------------------------------------------- what is loaded


def parts_of(prepared: Prepared) -> Parts:
    """As the job's dtype and quantisation make them."""
    prepare_libraries()
    from renderfarm.models.sizes import file_weights

    job, model, dtype = prepared.job, prepared.model, prepared.job.workers.dtype
    counted, not_counted = _components(model), {}
    if (given := job.model.quantization) is not None:
        for name in given.components:
            counted[name], not_counted[name] = _quantised(counted.get(name), given)
    beside = {f"{ADAPTER}{name}": file_weights(Path(path)) for name, path in model.adapters.items()}
    for name, weights in (counted | beside).items():
        if weights is None:
            not_counted[name] = "neither its configuration nor its files say how large it is"
    networks = {
        f"{STEP}{number}": size for number, step in enumerate(job.after) if (size := _network_bytes(step, prepared.after_files, dtype))
    }
    return Parts(
        {name: weights.memory[dtype] for name, weights in counted.items() if weights},
        {name: weights.layer[dtype] for name, weights in counted.items() if weights},
        {name: weights.memory[dtype] for name, weights in beside.items() if weights} | networks,
        not_counted,
    )


def _components(model: ModelInfo) -> dict[str, Weights | None]:
    """Of the model, and of what is used beside it, as the family's module loads them."""
    from renderfarm.models.sizes import component_weights, pipeline_weights

    found = pipeline_weights(Path(str(model.folder)), model.variant, () if model.safety_checker else SAFETY)
    for name, folder in model.companions.items():
        if name == "controlnet":
            found[name] = component_weights(Path(folder), "diffusers", "ControlNetModel", model.variant_of(name))
        else:  # DeepFloyd's first stage reads the texts for both
            left_out = {*SAFETY, "text_encoder"} if name == "super_resolution" else SAFETY
            parts = pipeline_weights(Path(folder), model.variant_of(name), left_out)
            found |= {f"{name}/{part}": weights for part, weights in parts.items()}
    return found


def _quantised(weights: Weights | None, given: Quantization) -> tuple[Weights | None, str]:
    """With fewer bits where the backend's arguments say how many, and a remark on what that leaves open."""
    if (bits := weight_bits(given)) is None or weights is None:
        return weights, f"what {given.backend} saves with these arguments; it is counted as if it were not quantised"
    return weights.quantised(bits), f"the scales that {given.backend} keeps beside {bits}-bit weights"


def weight_bits(given: Quantization) -> int | None:
    """Of a quantised weight; None: the arguments do not say."""
    arguments = given.arguments
    if given.backend == "bitsandbytes":
        return 4 if arguments.get("load_in_4bit") else 8 if arguments.get("load_in_8bit") else None
    if given.backend == "quanto":
        match = re.fullmatch(r"(?:int|float)(\d)", str(arguments.get("weights_dtype")))
    else:
        match = re.search(r"(?:Int|Float)(\d)Weight", str(arguments.get("quant_type")))
    return int(match[1]) if match else None


def _network_bytes(step: Step, files: Mapping[str, bytes], dtype: str) -> int:
    """Of a step's network; 0 for one that has none. The detector of faces is small, and not the device's."""
    from renderfarm.models.sizes import width

    if step.upscale is not None:
        return _numbers(identify(files[str(step.upscale.sha256)])) * width(dtype)
    if step.restore_faces is not None:
        return _numbers(identify_face(files[str(step.restore_faces.sha256)])) * width("float32")
    return 0


def _numbers(network: Network | FaceNetwork) -> int:
    return sum(math.prod(shape) for shape in network.shapes().values())


# ---------------------------------------------------------------------------------------------- and where it is


def held_at_once(parts: Parts, prepared: Prepared) -> tuple[int, str]:
    """Bytes of weights that one worker has on its device at the most, and what they are."""
    workers, beside = prepared.job.workers, sum(parts.beside.values())
    if workers.offload == "sequential":
        return max(parts.layers.values(), default=0) + beside, "the largest layer: workers.offload is sequential"
    if workers.offload == "model":
        together, names = _largest_turn(parts.components, prepared.model)
        return together + beside, f"{' and '.join(names)}, the most at once: workers.offload is model"
    if (devices := several_devices(workers)) is not None:
        return max(dealt(parts.components.values(), devices)) + beside, f"the fullest of {devices} devices; no component is split"
    return parts.total, "all of them"


def _largest_turn(components: Mapping[str, int], model: ModelInfo) -> tuple[int, list[str]]:
    """With `offload: model`, components take turns in the pipeline's order; one that has no place in it stays beside them, and
    so does an autoencoder that has read an image before the denoiser's turn."""
    import diffusers

    kind = getattr(diffusers, model.pipeline_class)
    in_turn = set(str(kind.model_cpu_offload_seq).split("->"))
    turns = []
    for _, names in itertools.groupby(sorted(components, key=_pipeline_of), key=_pipeline_of):
        own = list(names)
        staying = [name for name in own if "/" not in name and (name not in in_turn or (name == "vae" and "image" in model.images))]
        others = [name for name in own if name not in staying] or [""]
        largest = max(others, key=lambda name: components.get(name, 0))
        at_once = [name for name in (largest, *staying) if name]
        turns.append((sum(components[name] for name in at_once), at_once))
    return max(turns, default=(0, []))


def _pipeline_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def dealt(sizes: Iterable[int], devices: int) -> list[int]:
    """Bytes on each of several equal devices, as diffusers' `device_map: balanced` deals components out: the largest first, there
    and back again."""
    held, order = [0] * devices, [*range(devices), *reversed(range(devices))]
    for place, size in zip(itertools.cycle(order), sorted(sizes, reverse=True), strict=False):
        held[place] += size
    return held


def workers_of_a_device(job: Job) -> int:
    """How many share one, where each asks for a part of it."""
    share = job.workers.devices_per_worker
    return min(job.workers.max, math.floor(1 / share + 1e-9)) if share < 1 else 1
