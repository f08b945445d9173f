"""workers.attention_backend: the pixels of diffusers' own pipeline with the same backend set, and refusals where it means nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from checker import image_rows
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from oracle import DTYPES, LEGAL, Model, row

import renderfarm
from renderfarm.config import AttentionBackend, ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.models.catalog import describe
from renderfarm.models.load import load_model
from renderfarm.preparation import prepare
from renderfarm.records import Sample
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]
DISPATCHED = ["flux-dev", "flux-schnell", "flux2-dev", "flux2-klein", "flux2-klein-distilled", "qwen-image", "z-image"]
OTHERS = ["sd", "lcm", "sdxl", "sd3", "pixart-sigma", "sana", "deepfloyd"]
MATH = "_native_math"  # of the backends that a CPU has, the one with other bits than native


@dataclass
class WithMath(Model):
    """Both sides with the backend: ours by the job's field, diffusers' by its own method."""

    @property
    def workers(self) -> Workers:
        return super().workers.model_copy(update={"attention_backend": MATH})

    @cached_property
    def pipe(self) -> Any:
        pipe = Model.pipe.func(self)  # type: ignore[attr-defined]
        with attention_backend():
            pipe.transformer.set_attention_backend(MATH)
        return pipe


@pytest.fixture
def with_math(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., WithMath]]:
    made: list[WithMath] = []

    def make(name: str, dtype: str = "float32") -> WithMath:
        made.append(WithMath(name, tiny_model(name), dtype))
        return made[-1]

    yield make
    for one in made:
        one.close()


def predictions(denoiser: torch.nn.Module, action: Callable[[], Any]) -> list[torch.Tensor]:
    """All that the denoiser gives back meanwhile."""
    seen: list[torch.Tensor] = []
    handle = denoiser.register_forward_hook(lambda _, __, outputs: seen.extend(part.clone() for part in outputs[0]))
    try:
        action()
    finally:
        handle.remove()
    return seen


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows_of(name: str) -> list[Sample]:
    usual: dict[str, Any] = {"sampler": LEGAL[name][0], "num_inference_steps": 2}
    guided = {
        "flux-dev": {"true_cfg_scale": 3.0, "negative_prompt": "grey"},
        "flux2-dev": {"guidance_scale": 2.5},
        "flux2-klein": {"guidance_scale": 2.5, "negative_prompt": "grey"},
        "qwen-image": {"true_cfg_scale": 3.0, "negative_prompt": "grey"},
        "z-image": {"guidance_scale": 2.5, "negative_prompt": "grey"},
    }
    return [row(0, **usual), row(1, prompt="two blue squares", **usual), row(2, **usual | guided[name])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["flux-dev", "qwen-image", "z-image", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux2-dev", "flux2-klein"))]
)
def test_a_backend_gives_the_bits_of_diffusers_with_it(
    name: str, dtype: str, model: Callable[..., Model], with_math: Callable[..., WithMath]
) -> None:
    plain, one, rows = model(name, dtype), with_math(name, dtype), rows_of(name)
    alone = [one.render([wanted])[0] for wanted in rows]
    for wanted, ours in zip(rows, alone, strict=True):
        np.testing.assert_array_equal(ours, one.reference(wanted), err_msg=str(wanted))
    for order in (rows, rows[::-1]):
        for wanted, ours in zip(order, one.render(order), strict=True):
            np.testing.assert_array_equal(ours, alone[rows.index(wanted)], err_msg=str(wanted))
    # pixels are rounded: the denoiser's own numbers say whether the backend reached it, and that the comparison can fail
    wanted = rows[0]
    ours = predictions(one.denoiser, lambda: one.render([wanted]))
    one.known.clear()
    assert equal(ours, predictions(one.pipe.transformer, lambda: one.reference(wanted)))
    if dtype == "float32":
        assert not equal(ours, predictions(plain.denoiser, lambda: plain.render([wanted])))


def test_a_backend_is_its_denoisers_and_not_the_processes(with_math: Callable[..., WithMath]) -> None:
    before = _AttentionBackendRegistry.get_active_backend()[0]
    assert with_math("flux-dev").adapter.profile()["attention_backend"] == MATH
    assert _AttentionBackendRegistry.get_active_backend()[0] == before != MATH


@pytest.mark.parametrize("name", LEGAL)
def test_the_table_knows_which_denoisers_ask_diffusers_for_attention(name: str, model: Callable[..., Model]) -> None:
    one = model(name)
    asks = any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in one.denoiser.modules())
    assert one.info.attention_backends == asks == (name in DISPATCHED)


@pytest.mark.parametrize("name", OTHERS)
def test_where_diffusers_would_ignore_a_backend_it_is_refused(
    name: str, tiny_model: Callable[[str], Path], model: Callable[..., Model], write_manifest: Write, write_job: Write
) -> None:
    job = load_job(write_job(write_manifest(), model=str(tiny_model(name)), workers={"attention_backend": MATH}))
    with pytest.raises(InvalidJob, match=r"does not ask diffusers for attention, .*leave it out \(those that do: FluxPipeline, "):
        prepare(job)
    with pytest.raises(Fatal, match="does not ask diffusers for attention"):  # what the worker of an unknown class finds
        load_model(describe(ModelSpec(id=str(tiny_model(name)))), job.workers)
    one, wanted = model(name), row(sampler=LEGAL[name][0])
    denoiser = getattr(one.pipe, "transformer", None) or one.pipe.unet
    plain = predictions(denoiser, lambda: one.reference(wanted))
    with attention_backend():
        denoiser.set_attention_backend(MATH)
        one.known.clear()
        assert equal(plain, predictions(denoiser, lambda: one.reference(wanted)))


def test_every_backend_of_diffusers_is_known_and_those_that_fetch_code_are_refused(write_manifest: Write, write_job: Write) -> None:
    theirs = {name.value for name in AttentionBackendName}
    hub = {name for name in theirs if name.endswith("_hub")}
    assert set(get_args(AttentionBackend)) == theirs - hub
    manifest = write_manifest()
    for name in hub:
        with pytest.raises(InvalidJob, match=f"{name} fetches code from the hub"):
            load_job(write_job(manifest, workers={"attention_backend": name}))
    with pytest.raises(InvalidJob, match=r"'native', '_native_math', .* or '_sage_.*', not 'fast'"):
        load_job(write_job(manifest, workers={"attention_backend": "fast"}))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="is about a package that is missing")
@pytest.mark.parametrize(
    ("backend", "reason"),
    [("flash", "not usable because of missing package"), ("_native_cudnn", "cannot render this model here: .*; give another one")],
)
def test_a_backend_that_does_not_work_here_stops_the_job_with_the_reason(
    backend: str, reason: str, tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}
    job = write_job(write_manifest(), model=str(tiny_model("flux-dev")), render=small, workers={"attention_backend": backend})
    with pytest.raises(Fatal, match=f"workers.attention_backend {backend}.*{reason}"):
        renderfarm.run(job, engine="inline")
    assert not (tmp_path / "out/data").exists()


def test_a_backend_is_frozen_and_verify_sets_it_again(
    tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = str(tiny_model("flux-dev"))
    small: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}
    manifest = write_manifest({"prompt": ["a", "b", "c"]})
    job = write_job(manifest, model=folder, render=small, workers={"attention_backend": MATH})
    assert renderfarm.run(job, engine="inline").images == 3
    verified = verify(str(tmp_path / "out"), Choice(all=True), model=folder)
    assert (verified.profile_differences, [again.result for again in verified.again]) == ([], ["identical"] * 3)
    with pytest.raises(InvalidJob, match=r'workers\.attention_backend: "_native_math" there, null now'):
        renderfarm.run(write_job(manifest, model=folder, render=small), engine="inline")
    other = write_job(manifest, model=folder, render=small, output={"path": str(tmp_path / "plain")})
    renderfarm.run(other, engine="inline")
    profiles = [image_rows(tmp_path / out)[0]["profile_sha256"] for out in ("out", "plain")]
    assert profiles[0] != profiles[1]
