"""Every family's pixels are those of diffusers' own pipeline called with B copies of the row, for every sampler that is legal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import families
import numpy as np
import pytest
import torch
from test_exactness import REFERENCE

from renderfarm.config import ModelSpec, Workers
from renderfarm.errors import Filtered, InvalidInput, InvalidJob
from renderfarm.models.catalog import ModelInfo, describe
from renderfarm.models.load import load_model
from renderfarm.records import Sample, SampleKey
from renderfarm.samplers import SAMPLERS, find_sampler
from renderfarm.slots import Rendered, SlotLoop

B = 3
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Written apart from the package's tables, as a user of diffusers would write it.
CLASSES = {
    "sd": diffusers.StableDiffusionPipeline,
    "sd-guidance-embedded": diffusers.StableDiffusionPipeline,
    "lcm": diffusers.LatentConsistencyModelPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sdxl-plain": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "sd3-dynamic": diffusers.StableDiffusion3Pipeline,
    "flux-dev": diffusers.FluxPipeline,
    "flux-schnell": diffusers.FluxPipeline,
}
FLOW_REFERENCE: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow-euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "flow-dpm++2m": (diffusers.DPMSolverMultistepScheduler, {**FLOW, "algorithm_type": "dpmsolver++"}),
    "flow-unipc": (diffusers.UniPCMultistepScheduler, FLOW),
}
LEGAL: dict[str, list[str]] = {
    "sd": list(REFERENCE),
    "sd-guidance-embedded": list(REFERENCE),
    "lcm": ["lcm"],
    "sdxl": list(REFERENCE),
    "sdxl-plain": ["euler"],
    "sd3": list(FLOW_REFERENCE),
    "sd3-dynamic": list(FLOW_REFERENCE),
    "flux-dev": list(FLOW_REFERENCE),
    "flux-schnell": ["flow-euler", "flow-unipc"],
}
DTYPES = ("float32", "bfloat16")


@dataclass
class Model:
    """One family at one dtype: ours behind a slot loop, and diffusers' own pipeline, both loaded on first use."""

    name: str
    folder: Path
    dtype: str

    @cached_property
    def info(self) -> ModelInfo:
        return describe(ModelSpec(id=str(self.folder)))

    @cached_property
    def loop(self) -> SlotLoop:
        loop = SlotLoop(lambda: load_model(self.info, Workers(batch_size=B, dtype=self.dtype)))  # type: ignore[arg-type]
        loop.ready.result()
        return loop

    @property
    def adapter(self) -> Any:
        return self.loop.ready.result()

    @property
    def denoiser(self) -> torch.nn.Module:
        found: torch.nn.Module = getattr(self.adapter.pipe, "unet", None) or self.adapter.pipe.transformer
        return found

    @cached_property
    def pipe(self) -> Any:
        absent = {"text_encoder_3": None, "tokenizer_3": None} if self.name == "sd3-dynamic" else {}
        pipe = CLASSES[self.name].from_pretrained(self.folder, dtype=getattr(torch, self.dtype), **absent)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.enable_slicing()
        pipe.original_config = dict(pipe.scheduler.config)
        return pipe

    def render(self, rows: list[Sample]) -> list[np.ndarray]:
        return pixels(self.loop.submit(rows))

    def reference(self, wanted: Sample) -> np.ndarray:
        """Image 0 of diffusers' pipeline called with B copies of the row."""
        kind, changes = (REFERENCE | FLOW_REFERENCE)[wanted.sampler]
        if changes.get("use_flow_sigmas"):
            changes = {**changes, "flow_shift": self.pipe.original_config["shift"]}
        self.pipe.scheduler = kind.from_config(self.pipe.original_config, **changes)
        texts = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
        arguments = {name: [getattr(wanted, name)] * B for name in texts if getattr(wanted, name) is not None}
        if wanted.true_cfg_scale is not None:
            arguments["true_cfg_scale"] = wanted.true_cfg_scale
        images = self.pipe(
            **arguments,
            height=wanted.height,
            width=wanted.width,
            num_inference_steps=wanted.num_inference_steps,
            guidance_scale=wanted.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(wanted.seed) for _ in range(B)],
        ).images
        return np.asarray(images[0])


def pixels(futures: list[Future[Rendered]]) -> list[np.ndarray]:
    return [future.result(timeout=300).pixels for future in futures]


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Model]]:
    made: dict[tuple[str, str], Model] = {}

    def get(name: str, dtype: str = "float32") -> Model:
        return made.setdefault((name, dtype), Model(name, tiny_model(name), dtype))

    yield get
    for one in made.values():
        if "loop" in vars(one):
            one.loop.close()


def row(number: int = 0, **values: Any) -> Sample:
    usual: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": None,
        "seed": 7 + number,
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
    }
    return Sample(key=SampleKey(number, 0), row_id=str(number), **usual | values)


def mixed_rows(name: str) -> list[Sample]:
    """Samplers, steps, guidance (on and off), texts of each encoder, sizes and seeds, all different."""
    rows = []
    for number in range(max(8, len(LEGAL[name]))):
        values: dict[str, Any] = {
            "sampler": LEGAL[name][number % len(LEGAL[name])],
            "prompt": f"a {('red', 'green', 'blue')[number % 3]} star {number}",
            "num_inference_steps": 2 + number % 3,
            "guidance_scale": (1.0, 3.0, 7.5, 0.0)[number % 4],
            "height": (32, 40)[number // 3 % 2],
        }
        if name not in ("lcm", "sd-guidance-embedded") and number % 2:
            values["negative_prompt"] = ("a square", "")[number % 3 == 0]
        if name.startswith(("sdxl", "sd3", "flux")) and number % 3 == 1:
            values |= {"prompt_2": f"a second text {number}", "negative_prompt_2": "grey"}
        if name.startswith("sd3") and number % 3 == 2:
            values |= {"prompt_3": f"a third text {number}", "negative_prompt_3": "blurred"}
        if name.startswith("flux"):
            values["true_cfg_scale"] = (None, 2.0, 1.0, 3.5)[number % 4]
        rows.append(row(number, **values))
    return rows


@pytest.mark.parametrize("name", CLASSES)
def test_the_samplers_compared_here_are_those_offered(name: str, model: Callable[..., Model]) -> None:
    info = model(name).info
    offered = {sampler.name for sampler in SAMPLERS.values() if sampler.kind == info.kind} - set(info.refused_samplers)
    assert offered == set(LEGAL[name]) or name == "sdxl-plain"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "sampler"), [(name, sampler) for name, samplers in LEGAL.items() for sampler in samplers])
def test_pixels_equal_those_of_diffusers_own_pipeline(name: str, sampler: str, dtype: str, model: Callable[..., Model]) -> None:
    one = model(name, dtype)
    wanted = row(sampler=sampler)
    np.testing.assert_array_equal(one.render([wanted])[0], one.reference(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_mixed_batch_gives_each_row_the_pixels_that_diffusers_gives_it_alone(name: str, dtype: str, model: Callable[..., Model]) -> None:
    one, rows = model(name, dtype), mixed_rows(name)
    for wanted, ours in zip(rows, one.render(rows), strict=True):
        np.testing.assert_array_equal(ours, one.reference(wanted), err_msg=str(wanted))
