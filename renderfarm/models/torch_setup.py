"""Torch, set up for exactness, and described: the flags, the render profile, the translation of torch's errors."""

from __future__ import annotations

import contextlib
import operator
import os
import platform
from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import diffusers
import torch
import transformers
from PIL import features

from renderfarm.config import Workers, several_devices
from renderfarm.errors import Fatal, OutOfMemory
from renderfarm.models.allocator import keep_freed_memory
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.fingerprint import companion_hashes, weight_hashes

P = ParamSpec("P")
R = TypeVar("R")


# What torch says in a bare RuntimeError: allocators of the CPU and of MPS, CUDA's libraries, kernels that count in 32 bits
TOO_MUCH = (
    *("out of memory", "can't allocate memory", "not enough memory", "Invalid buffer size", "STATUS_ALLOC_FAILED"),
    *("canUse32BitIndexMath", "INT_MAX elements"),
)


def is_too_much(error: Exception) -> bool:
    """Whether a smaller batch or picture might have gone well."""
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in TOO_MUCH))


def translated(function: Callable[P, R]) -> Callable[P, R]:
    """Turn torch's out-of-memory errors into ours, with advice; B never changes silently."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_too_much(error):
                raise
            raise OutOfMemory(
                "the device has too little memory for this size at the job's batch size; lower workers.batch_size "
                "(in a new output: it decides pixels), height or width, or use workers.dtype: bfloat16 or workers.offload: model"
            ) from error

    return inner


# What chooses kernels, wherever it may have been changed before: torch's defaults, but for benchmarks and precision. All of it
# is in the profile, so that what it was is known.
FLAGS: tuple[tuple[str, str, Any], ...] = (
    ("cudnn", "enabled", True),
    ("cudnn", "benchmark", False),
    ("cudnn", "deterministic", True),
    ("cudnn.conv", "fp32_precision", "ieee"),
    ("cudnn.rnn", "fp32_precision", "ieee"),
    ("cuda.matmul", "fp32_precision", "ieee"),
    ("cuda.matmul", "allow_fp16_reduced_precision_reduction", True),
    ("cuda.matmul", "allow_bf16_reduced_precision_reduction", True),
    ("cuda.matmul", "allow_fp16_accumulation", False),
    ("mkldnn", "enabled", True),
    ("mkldnn", "deterministic", False),
    ("mkldnn.matmul", "fp32_precision", "ieee"),
    ("mkldnn.conv", "fp32_precision", "ieee"),
    ("mkldnn.rnn", "fp32_precision", "ieee"),
)
ATTENTION = ("flash", "mem_efficient", "math", "cudnn")  # torch's kernels for it; on a CPU the first two words count as well
LIBRARIES = ("blas", "linalg")  # which ones compute matrices on CUDA


def _backend(place: str) -> Any:
    return operator.attrgetter(place)(torch.backends)


def _flags(device: str) -> dict[str, Any]:
    found = {f"{place}.{flag}": getattr(_backend(place), flag) for place, flag, _ in FLAGS}
    found |= {f"sdp.{kernels}": getattr(torch.backends.cuda, f"{kernels}_sdp_enabled")() for kernels in ATTENTION}
    # left as they are: a user may have asked for one by its variable
    found |= {f"preferred_{kind}": getattr(torch.backends.cuda, f"preferred_{kind}_library")().name for kind in LIBRARIES}
    return found | ({"tunable": torch.cuda.tunable.is_enabled()} if device == "cuda" else {})


def prepare_torch(workers: Workers) -> str:
    """Set every flag that exactness needs, one by one, and return the device ("cuda", "mps" or "cpu")."""
    device = find_device(workers)
    if device == "cpu":
        keep_freed_memory()
    torch.set_num_threads(workers.threads)
    torch.set_default_dtype(torch.float32)  # tables of timesteps and sigmas are made with it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # by the old words first: torch refuses to read these once only the new ones were used after them
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for place, flag, value in FLAGS:
        setattr(_backend(place), flag, value)
    for kernels in ATTENTION:
        getattr(torch.backends.cuda, f"enable_{kernels}_sdp")(True)
    if device == "cuda":
        _turn_tuning_off()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return device


def _turn_tuning_off() -> None:
    """torch's TunableOp takes the kernel that was fastest just now. Its variable wins over what is set here."""
    torch.cuda.tunable.enable(False)
    if torch.cuda.tunable.is_enabled():
        raise Fatal(
            "the environment variable PYTORCH_TUNABLEOP_ENABLED makes torch choose kernels by timing them, in each process anew, "
            "so the same bits would not come out again; unset it"
        )


def find_device(workers: Workers) -> str:
    """The device that the job asks for, or the best there is. Raises Fatal where torch does not find it."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name, there in is_there.items() if there) if workers.device == "auto" else workers.device
    if not is_there[device]:
        kind, build = {"cuda": ("GPU", "CUDA"), "mps": ("GPU of Apple's", "MPS")}[device]
        raise Fatal(f"workers.device is {device}, but torch finds no {kind} here (or is built without {build}); use device: auto or cpu")
    if workers.offload != "none" and device == "cpu":
        raise Fatal(f"workers.offload {workers.offload} saves an accelerator's memory, and torch finds none here; leave it out on a CPU")
    devices = several_devices(workers)
    if devices is not None and torch.cuda.device_count() < devices:
        raise Fatal(f"workers.devices_per_worker is {devices}, but torch finds {torch.cuda.device_count()} of them here; lower it")
    return device


def name_devices() -> list[str]:
    """The accelerators that torch finds, with their memory."""
    if torch.backends.mps.is_available():
        return [_device_model("mps")]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in found]


def free_memory(workers: Workers) -> tuple[str, int | None]:
    """The kind of device that a job uses here, and the bytes that are free on the first one; None where nobody says."""
    device = find_device(workers)
    if device == "cuda":
        return device, int(torch.cuda.mem_get_info()[0])
    if device == "mps":
        return device, None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return device, None
    return device, next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def describe_profile(info: ModelInfo, workers: Workers, device: str) -> dict[str, Any]:
    """The part of the profile that all families share."""
    return {
        "model": info.name,
        "model_revision": info.revision,
        "weights": _all_hashes(info),
        "dtype": workers.dtype,
        "device": device,
        "device_model": _device_model(device),
        # noise is drawn and schedules are made on the CPU, whatever renders
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_instructions": _cpu_instructions(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _decides_pixels(name)},
        "threads": workers.threads,  # blended noise is summed on the CPU, and schedulers make their tables there
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": None if device != "cuda" else torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "flags": _flags(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_packages": _cuda_packages() if device == "cuda" else None,
        **{
            name: version(name) for name in ("diffusers", "transformers", "tokenizers", "numpy", "scipy", "pillow")
        },  # LMS integrates with scipy
        **({"image_codecs": _image_codecs()} if info.images else {}),
        # where it is installed, transformers takes other image processors
        **(versions_of("torchvision") if info.safety_checker else {}),
    }


def _image_codecs() -> dict[str, str | None]:
    """Those of rows' images: Pillow's own version does not say which ones it was built with, or finds."""
    return {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp", "zlib")}


def _all_hashes(info: ModelInfo) -> dict[str, str]:
    found = weight_hashes(Path(info.folder), info.variant, safety_checker=info.safety_checker) if info.folder else {}
    for name, folder in info.companions.items():
        found |= {f"{name}/{path}": digest for path, digest in companion_hashes(Path(folder), info.variant_of(name)).items()}
    return found


def attention_packages() -> dict[str, str]:
    """What diffusers' attention backends take their kernels from."""
    return versions_of("flash_attn", "flash_attn_3", "sageattention", "xformers")


def versions_of(*names: str) -> dict[str, str]:
    """Versions of the packages, of those that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cuda_packages() -> dict[str, str]:
    """Versions of NVIDIA's packages (cuBLAS, cuDNN, …), where torch takes its libraries from them: the process may load others
    than torch was built with. torch.version.cuda says what a build that brings its own was made with."""
    found = {str(package.name): package.version for package in distributions()}
    return {name: found[name] for name in sorted(found) if name.startswith("nvidia-cu")}


def _decides_pixels(name: str) -> bool:
    """Variables by which kernels are chosen; how many threads they use is said elsewhere."""
    chosen = (
        *("ONEDNN_", "DNNL_", "MKL_", "NPY_", "ATEN_", "TORCH_MKLDNN_", "TORCH_LINEAR_", "DIFFUSERS_ATTN_BACKEND", "DIFFUSERS_GGUF_"),
        *("CUBLAS_", "CUBLASLT_", "TORCH_CUBLASLT_", "TORCH_BLAS_", "TORCH_LINALG_", "DISABLE_ADDMM_CUDA_LT", "PYTORCH_TUNABLEOP_"),
        *("CUDNN_", "TORCH_CUDNN_", "NVIDIA_TF32_OVERRIDE"),
        *("PYTORCH_MPS_FAST_MATH", "PYTORCH_MPS_PREFER_METAL", "PYTORCH_ENABLE_MPS_FALLBACK"),
    )
    return name.startswith(chosen) and not name.endswith("_NUM_THREADS")


def _device_model(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "mps":  # its kernels come with the system; not every torch can name the chip
        name: str = getattr(torch.backends.mps, "get_name", platform.machine)()
        return f"{name}, macOS {platform.mac_ver()[0]}"
    return _cpu_model()


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _cpu_model() -> str:
    """Maker, family and model: libraries choose kernels by them as well, and clocks and cores decide no pixel."""
    info = _cpuinfo()
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    return " ".join([platform.machine(), *(info[name] for name in names if name in info)])


def _cpu_instructions() -> list[str]:
    """The vector and matrix instructions that oneDNN, MKL and NumPy choose between: torch's capability names the class only."""
    flags = (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()
    return sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "sse4", "f16c", "asimd", "sve", "sme", "bf16", "i8mm")))
