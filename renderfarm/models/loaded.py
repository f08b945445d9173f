"""A diffusers pipeline, loaded for exactness: what every family shares, however it is batched."""

from __future__ import annotations

import importlib.util
import os
import warnings
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.models.attention_dispatch import attention_backend

from renderfarm.adapters import parse
from renderfarm.config import Workers, fixed_batch_size, several_devices
from renderfarm.errors import Fatal
from renderfarm.models.catalog import ModelInfo
from renderfarm.models.fingerprint import file_sha256
from renderfarm.models.quantization import from_gguf, load_arguments, quantization_profile
from renderfarm.models.torch_setup import attention_packages, describe_profile, prepare_torch
from renderfarm.models.weighted import WeightedTexts


def set_up(pipe: Any) -> None:
    """A pipeline that is called as a whole: silent, image by image through its autoencoder, its scheduler kept."""
    pipe.set_progress_bar_config(disable=True)
    pipe.own_scheduler = pipe.scheduler
    vae: Any = getattr(pipe, "vae", None)
    if hasattr(vae, "enable_slicing"):
        vae.enable_slicing()  # a batched VAE in bf16 gives other pixels
    processor = getattr(pipe, "image_processor", None)
    if processor is not None:
        processor.postprocess = _seen_through(processor.postprocess)


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration for the profile: names with `_` are diffusers' own notes, one of them a list in hash order."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _seen_through(postprocess: Any) -> Any:
    """It clips a picture to 0..1, and what is infinite would become white or black: NaN stays what it is."""

    def inner(image: Any, *args: Any, **kwargs: Any) -> Any:
        return postprocess(only_finite(image), *args, **kwargs)

    return inner


def only_finite(image: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(image, nan=torch.nan, posinf=torch.nan, neginf=torch.nan)


def _whole(kind: Any, folder: str, what: str, **arguments: Any) -> Any:
    """A pipeline, or one component of it, with all its weights. Raises Fatal, also where files lack some: transformers would
    draw them at random, others in each process, and say so in a log."""
    try:
        with _missing_weights() as missing:
            loaded = kind.from_pretrained(folder, **arguments)
    except Exception as error:  # damaged weights raise many kinds; none of them is the row's fault
        reason = str(error).strip().removesuffix(".")
        raise Fatal(f"{what}: cannot be loaded from {folder}: {reason}; is a file damaged, or cut off? Fetch it again") from error
    for name, part in getattr(loaded, "components", {"weights": loaded}).items():
        if isinstance(part, torch.nn.Module) and "device_map" not in arguments:  # diffusers leaves them without data
            missing += [f"{name}: {key}" for key, tensor in part.state_dict().items() if tensor.is_meta]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise Fatal(f"{what}: {folder} lacks weights ({'; '.join(missing[:3])}{more}); is it the whole model? Fetch it again")
    return loaded


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """What models of transformers that are loaded meanwhile do not find in their files. Pipelines load them with arguments of
    their own, so each is asked for its report on the way. One model is loaded at a time in a process (`slots`)."""
    missing: list[str] = []
    class_ = transformers.PreTrainedModel
    plain = vars(class_)["from_pretrained"]

    def reporting(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model, report = plain.__func__(cls, *args, **{**kwargs, "output_loading_info": True})
        missing.extend(f"{cls.__name__}: {key}" for key in sorted(report["missing_keys"]))
        return (model, report) if kwargs.get("output_loading_info") else model

    class_.from_pretrained = classmethod(reporting)
    try:
        yield missing
    finally:
        class_.from_pretrained = plain


class LoadedPipeline(ABC):
    """`pipeline`: diffusers' class. `text_length`: positions that the longest text encoder reads at once. `weighted`: reads
    the texts instead of the pipeline, where the job says `prompt_weighting`."""

    pipeline: Any
    text_length: int

    def __init__(self, info: ModelInfo, workers: Workers) -> None:
        self.info, self.workers, self.batch_size = info, workers, fixed_batch_size(workers)
        self.device = prepare_torch(workers)
        # one thread goes through a batch from its beginning to its end, whatever its shape; elsewhere each shape is tried
        self.keeps_places = self.device == "cpu" and workers.threads == 1
        if info.prompt_weighting and workers.offload == "sequential":  # compel asks the text encoder where it is: nowhere
            raise Fatal("render.prompt_weighting and workers.offload: sequential do not go together; use offload: model")
        self.dtype: torch.dtype = getattr(torch, workers.dtype)
        assert info.folder is not None
        self.pipe = self._load(info.folder)
        self.scheduler_config = dict(self.pipe.scheduler.config)  # samplers take the scheduler's place later
        self._on: str | None = None
        if info.adapters:
            self._load_adapters()
        self.weighted = WeightedTexts(self.pipe) if info.prompt_weighting else None
        if workers.attention_backend is not None:
            self._use_attention(workers.attention_backend)
        self._stage = ""
        self._place(self.pipe)

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, "transformer", None) or self.pipe.unet

    def _load(self, folder: str) -> Any:
        arguments: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "variant": self.info.variant}
        arguments |= self._load_arguments() | load_arguments(self.info) | from_gguf(self.info, self.dtype)
        if several_devices(self.workers) is not None:
            arguments["device_map"] = "balanced"  # over all devices that the worker sees
        return _whole(self.pipeline, folder, f"model {self.info.id}", dtype=self.dtype, **arguments)

    def _place(self, pipe: Any) -> None:
        """Onto the device: at once, or part by part when they are called."""
        try:
            if self.workers.offload == "model":
                pipe.enable_model_cpu_offload(device=self.device)
            elif self.workers.offload == "sequential":
                pipe.enable_sequential_cpu_offload(device=self.device)
            elif several_devices(self.workers) is None:  # else it is where the map put it
                pipe.to(self.device)
        except Exception as error:  # the device's memory, or a class that diffusers cannot offload
            raise Fatal(
                f"model {self.info.id}: cannot be put on {self.device} (workers.offload: {self.workers.offload}): {error}; "
                "model and sequential need less memory there than none"
            ) from error

    def turn_to(self, stage: str) -> None:
        """With `offload: model`, what the last stage called leaves the device. diffusers moves components out in the order
        of its own call, texts to picture; in slots, these stages come in any order."""
        if stage != self._stage:
            for hook in getattr(self.pipe, "_all_hooks", ()):
                hook.offload()
            self._stage = stage

    def _load_arguments(self) -> dict[str, Any]:
        return {}

    def _load_companion(self, kind: Any, name: str, **arguments: Any) -> Any:
        """Another pipeline of the job's, or a part that the pipeline takes, from its own folder."""
        folder = self.info.companions[name]
        arguments |= {"use_safetensors": True, "local_files_only": True, "variant": self.info.variant_of(name)}
        loaded = _whole(kind, folder, f"model.{name}", dtype=self.dtype, **arguments)
        if hasattr(loaded, "scheduler"):  # else it is a part of the pipeline, which is put on the device as one
            set_up(loaded)
            self._place(loaded)
        return loaded

    def _load_adapters(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise Fatal("model.adapters need the package peft: pip install 'renderfarm[lora]'")
        for name, path in self.info.adapters.items():
            folder, file = os.path.split(path)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that there are several is meant
                    self.pipe.load_lora_weights(folder, weight_name=file, adapter_name=name, use_safetensors=True, local_files_only=True)
            except Exception as error:  # as above
                raise Fatal(f"model.adapters.{name}: {path} is no LoRA for {type(self.pipe).__name__}: {error}") from error
            if not any(name in of_part for of_part in self.pipe.get_list_adapters().values()):
                raise Fatal(f"model.adapters.{name}: {path} changes no layer of {type(self.pipe).__name__}; is it for another model?")
        self.pipe.disable_lora()

    def _use_attention(self, backend: str) -> None:
        """For this denoiser alone: diffusers makes it the process's default, too, and other models may be rendered here."""
        try:
            with attention_backend():  # afterwards the default is what it was
                self.denoiser.set_attention_backend(backend)
        except Exception as error:  # a package that is missing or too old
            raise Fatal(f"workers.attention_backend {backend}: {error}") from error
        processors = (getattr(module, "processor", None) for module in self.denoiser.modules())
        if not any(getattr(processor, "_attention_backend", None) is not None for processor in processors):
            raise Fatal(f"workers.attention_backend: {type(self.denoiser).__name__} does not ask diffusers for attention; leave it out")

    def use(self, adapters: str | None) -> None:
        """Turn these adapters on (`Sample.adapters`), and all others off."""
        if adapters == self._on:
            return
        if adapters is None:
            self.pipe.disable_lora()
        else:
            weights = parse(adapters, self.info.adapters)
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(weights), adapter_weights=list(weights.values()))
        self._on = adapters

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()

    def profile(self) -> dict[str, Any]:
        scheduler = described(self.scheduler_config)
        own = {"text_length": self.text_length, "vae_slicing": True, "scheduler": scheduler, "safety_checker": self.info.safety_checker}
        own |= quantization_profile(self.info)
        if self.info.adapters:
            own |= {"adapters": {name: file_sha256(Path(path)) for name, path in self.info.adapters.items()}, "peft": version("peft")}
        if self.weighted is not None:
            own |= {"prompt_weighting": self.weighted.profile()}
        if self.workers.attention_backend is not None:
            own |= {"attention_backend": self.workers.attention_backend, "attention_packages": attention_packages()}
        if (devices := several_devices(self.workers)) is not None:
            own["devices"] = devices
        return describe_profile(self.info, self.workers, self.device) | own | {"batch_size": self.batch_size}
