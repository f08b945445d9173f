"""Who renders: how many workers, on which devices, in batches of what size."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from renderfarm.config.base import Strict

Offload = Literal["none", "model", "sequential"]


# diffusers' AttentionBackendName, without those that fetch their code while they run
AttentionBackend = Literal[
    "native",
    "_native_math",
    "_native_flash",
    "_native_efficient",
    "_native_cudnn",
    "_native_npu",
    "_native_xla",
    "flash",
    "flash_varlen",
    "_flash_3",
    "_flash_varlen_3",
    "flex",
    "xformers",
    "sage",
    "sage_varlen",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
]


class Workers(Strict):
    min: Annotated[int, Field(ge=1)] = 1
    """A run begins with the first worker ready. Where fewer than `min` have been ready for `wait_s` (or fewer than there are parts left, if
    that is less), it finishes what is in flight and ends with exit code 75, to be run again when there are nodes."""
    max: Annotated[int, Field(ge=1)] = 1
    """Never more workers than this."""
    batch_size: Annotated[int, Field(ge=1, le=512)] | Literal["auto"] = 8
    """B: samples per denoiser call. Constant; part of the render profile, because it decides pixels. auto: the first
    worker measures what is fastest on its device, and the output keeps that."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else mps (Apple's GPUs; written for them, never run on one), else cpu."""
    devices_per_worker: Annotated[float, Field(gt=0, le=64)] = 1
    """Accelerators (GPUs) of each worker. A fraction shares one: 0.5 puts two workers on each, whose memory must hold both.
    Ray shares them out; the inline engine's one worker has what it sees. A whole number above 1 spreads the pipeline's
    components over so many (diffusers' `device_map: balanced`); no single component is split. That was never run on
    several devices, so it is part of the render profile. Without a GPU, up to 1 means nothing."""
    offload: Offload = "none"
    """For models larger than the device's memory: where components are while they wait. none: on the device. model: in the
    machine's memory; text encoders, denoiser and autoencoder take turns on the device. sequential: the same layer by
    layer, for the smallest devices, and very slow. The same kernels compute the same numbers wherever
    weights have waited, so it decides no pixel and may change from run to run. Its hooks were compared on a CPU only."""
    attention_backend: AttentionBackend | None = None
    """Who computes the denoiser's attention: one of diffusers' backends; those of other packages need the package. It decides
    pixels, so it is part of the render profile. FLUX.1, FLUX.2, Qwen-Image and Z-Image take one; the other families call
    torch's attention themselves. None: diffusers' default, native. Only native and _native_math were compared."""
    threads: Annotated[int, Field(ge=1, le=2)] = 1
    """Torch threads per worker on the CPU, 1 or 2; part of the render profile, even where a GPU renders. 2 need a batch_size
    of 1, 2 or a multiple of 4: with others the threads' shares end in mid-sample or in mid-vector, from 3 threads on they do
    with any. Then a sample's pixels would depend on its slot: use more workers instead."""

    wait_s: Annotated[float, Field(gt=0)] = 3600
    """Seconds that a run waits while fewer than `min` workers are ready (nodes that are to come or were taken away, a model that loads)
    before it ends with exit code 75."""
    other_profiles: Literal["refuse", "record"] = "refuse"
    """A worker whose render profile is not the output's (another CPU, another version) would render other bits. refuse:
    it is benched. record: it renders, and its rows name its own profile; the same row on another worker may differ."""

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"workers.min ({self.min}) is larger than workers.max ({self.max})")
        return self

    @field_validator("attention_backend", mode="before")
    @classmethod
    def _pinned_code(cls, name: Any) -> Any:
        if isinstance(name, str) and name.endswith("_hub"):
            raise ValueError(f"{name} fetches code from the hub and runs it, whichever is there that day; give a backend that is installed")
        return name

    @model_validator(mode="after")
    def _whole_devices(self) -> Workers:
        devices = self.devices_per_worker
        if devices > 1 and not devices.is_integer():
            raise ValueError(f"workers.devices_per_worker is {devices:g}; above 1 give a whole number, below 1 a share of one device")
        if devices != 1 and self.device in ("cpu", "mps"):
            raise ValueError(f"workers.devices_per_worker is {devices:g}, but {self.device} has nothing to share or add; leave it out")
        if devices < 1 and self.batch_size == "auto":
            raise ValueError("workers.batch_size auto measures as if the device were one worker's; with a share of it give a number")
        return self

    @model_validator(mode="after")
    def _somewhere_to_offload_from(self) -> Workers:
        if self.offload != "none" and self.device == "cpu":
            raise ValueError(f"workers.offload {self.offload} saves an accelerator's memory, and device cpu has none; leave it out")
        if self.offload != "none" and self.devices_per_worker > 1:
            raise ValueError(f"workers.offload {self.offload} is for one device; leave it out, or give devices_per_worker 1")
        return self

    @model_validator(mode="after")
    def _no_sample_is_cut(self) -> Workers:
        if not shared_evenly(size := fixed_batch_size(self), self.threads):
            raise ValueError(
                f"workers.threads {self.threads} cannot share a batch_size of {size} evenly: a sample cut in two gets pixels "
                f"that depend on its slot; use batch_size {size + -size % 4}, or threads 1 and more workers"
            )
        return self


def several_devices(workers: Workers) -> int | None:
    """How many devices a worker's pipeline is spread over; None: it is on one, or shares one."""
    return int(workers.devices_per_worker) if workers.devices_per_worker > 1 else None


def shared_evenly(batch_size: int, threads: int) -> bool:
    """Whether torch's threads share a batch without cutting a sample in two, or a vector of several samples' numbers."""
    return threads == 1 or batch_size <= threads or batch_size % 4 == 0


def fixed_batch_size(workers: Workers) -> int:
    """The job's B; 1 where it is still to be measured."""
    return 1 if workers.batch_size == "auto" else workers.batch_size
