"""The exactness comparison can fail: with any one of its conditions broken on purpose, pixels differ from the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from oracle import B, Model, row
from test_random_manifests import render

from renderfarm.config import Workers
from renderfarm.models import pipeline
from renderfarm.models.common import finite_pixels
from renderfarm.models.pipeline import SlotPipeline, State
from renderfarm.records import Sample, WorkerReady
from renderfarm.worker import Worker

Models = Callable[..., Model]


# In float32 another shape moves about one pixel in 20,000 by one level: several rows of 96 pixels, so that some are hit.
# In bfloat16 the tiny denoisers give equal pixels at B = 1 and 3 on a CPU (the products are summed in float32 either way);
# there it is the autoencoder whose batch shows.
CASES = [("sd", "euler-a"), ("sd3", "flow-euler")]


def rows(sampler: str, side: int) -> list[Sample]:
    prompts = ("a red circle", "two blue squares", "a green star on a white background", "a sky")
    return [row(number, sampler=sampler, height=side, width=side, prompt=prompt) for number, prompt in enumerate(prompts)]


def differs(one: Model, wanted: Sequence[Sample], reference: Model | None = None) -> bool:
    """Whether the comparison of `test_families.py` fails for any of the rows, each rendered alone."""
    return any(not np.array_equal(one.render([sample])[0], (reference or one).reference(sample)) for sample in wanted)


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_without_padding_pixels_differ(name: str, sampler: str, model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    one, wanted = model(name), rows(sampler, 96)
    assert not differs(one, wanted)
    padded = SlotPipeline.step

    def unpadded(self: SlotPipeline, states: Sequence[State]) -> list[bool]:
        self.batch_size = len(states)
        try:
            return padded(self, states)
        finally:
            self.batch_size = B

    monkeypatch.setattr(SlotPipeline, "step", unpadded)
    assert differs(one, wanted)


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_worker_with_another_batch_size_differs(name: str, sampler: str, model: Models, tiny_model: Callable[[str], Path]) -> None:
    other = Model(name, tiny_model(name), batch_size=1)
    try:
        assert differs(other, rows(sampler, 96), reference=model(name))
    finally:
        other.close()


def test_a_worker_of_a_job_that_renders_with_another_batch_size_differs(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of `test_random_manifests.py`, at a size at which B shows."""
    one, ready = model("sd"), Worker.ready
    columns = ("prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale", "sampler")
    wanted = {str(sample.key.row): {name: getattr(sample, name) for name in columns} for sample in rows("euler-a", 96)}

    def pixels_of_job() -> dict[tuple[str, int], str]:
        made = render(one, wanted, workers=2, part_rows=1, order=Random(1))
        return {key: record["pixel_sha256"] for key, record in made.items()}

    def other(worker: Worker) -> WorkerReady:
        found = ready(worker)
        if worker.spec.name == "w1":
            worker.slots.ready.result().batch_size = 1
        return found

    usual = pixels_of_job()
    assert pixels_of_job() == usual
    monkeypatch.setattr(Worker, "ready", other)
    assert pixels_of_job() != usual


@pytest.mark.parametrize(("name", "sampler"), [("sd", "euler-a"), ("flux-dev", "flow-euler")])
def test_an_autoencoder_that_decodes_a_batch_differs_in_bfloat16(
    name: str, sampler: str, model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, wanted = model(name, "bfloat16"), rows(sampler, 96)[:2]
    assert not differs(one, wanted)

    @torch.inference_mode()
    def batched(self: SlotPipeline, state: State) -> np.ndarray:
        latents = self._unscaled(state.latents.to(self.dtype), state.sample)
        images = self.pipe.vae.decode(torch.cat([latents] * B), return_dict=False)[0]
        return finite_pixels(images[:1], self.pipe.image_processor)

    monkeypatch.setattr(SlotPipeline, "decode", batched)
    assert differs(one, wanted)


def test_texts_encoded_with_others_differ_where_a_layer_is_no_whole_number_of_vectors_wide(
    model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = model("sd-odd-width").adapter
    texts = [(None, f"a {colour} star {number}") for number in range(4) for colour in ("red", "green", "blue")]  # no adapters on
    chunks = [texts[start : start + B] for start in range(0, len(texts), B)]
    apart = [embedding for chunk in chunks for (embedding,) in adapter.encode_texts(chunk)]
    monkeypatch.setattr(adapter, "mixes_texts", True)
    mixed = [embedding for chunk in chunks for (embedding,) in adapter.encode_texts(chunk)]
    assert not all(torch.equal(a, b) for a, b in zip(apart, mixed, strict=True))
    usual = model("sd").adapter
    assert usual.mixes_texts
    mixed = [embedding for chunk in chunks for (embedding,) in usual.encode_texts(chunk)]
    alone = [usual.encode_texts([text])[0][0] for text in texts]
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_a_denoiser_that_looks_at_the_whole_batch_is_found(model: Models) -> None:
    """As one whose activations are quantised with a scale for the whole tensor would. Copies alone cannot show it."""

    def mean_of_all(module: Any, given: Any, made: torch.Tensor) -> torch.Tensor:
        return made + made.mean()

    for name, sampler, layer in (("sd", "euler", "conv_out"), ("pixart-sigma", "euler", "proj_out")):
        one, wanted = model(name), replace(rows(sampler, 32)[0], guidance_scale=4.0)
        assert not one.adapter.places_that_differ(wanted)
        handle = getattr(one.adapter.denoiser, layer).register_forward_hook(mean_of_all)
        try:
            assert one.adapter.places_that_differ(wanted)
        finally:
            handle.remove()


def test_where_a_text_s_place_decides_its_embedding_each_is_encoded_alone(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two threads and B=6, SDXL's pooled embedding had other bits at the last two places."""
    adapter = model("sdxl").adapter
    real = adapter._encode
    texts = [(None, (f"{colour} star", f"{colour} star")) for colour in ("a red", "a blue", "a green")]
    alone = [adapter.encode_texts([text])[0] for text in texts]

    def by_place(texts: Any) -> tuple[torch.Tensor, ...]:
        return tuple(part + 1e-3 * torch.arange(len(part)).view(-1, *[1] * (part.dim() - 1)) for part in real(texts))

    monkeypatch.setattr(adapter, "_encode", by_place)
    monkeypatch.setattr(adapter, "keeps_places", False)
    monkeypatch.setattr(adapter, "_tried_texts_at", 0)
    monkeypatch.setattr(adapter, "mixes_texts", True)
    found = adapter.encode_texts(texts)
    assert not adapter.mixes_texts
    for one, other in zip(alone, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_samples_that_share_a_generator_differ(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    one, wanted = model("sd"), rows("euler-a", 32)
    own, shared = pipeline.initial_noise, torch.Generator("cpu").manual_seed(wanted[0].seed)

    def sharing(*arguments: Any) -> tuple[torch.Tensor, torch.Generator]:
        return own(*arguments)[0], shared

    monkeypatch.setattr(pipeline, "initial_noise", sharing)
    assert differs(one, wanted)
    for first, second in zip(one.render(wanted), one.render(wanted[::-1])[::-1], strict=True):
        assert not np.array_equal(first, second)  # and order decides pixels


def test_noise_from_the_global_random_state_differs_once_that_is_disturbed(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    one, wanted = model("sdxl"), rows("dpm++sde", 32)[:1]
    monkeypatch.setattr(one.adapter, "_step_arguments", lambda scheduler, generator: {})
    torch.manual_seed(1)
    first = one.render(wanted)[0]
    torch.manual_seed(2)
    assert not np.array_equal(first, one.render(wanted)[0])


def test_with_more_than_two_threads_an_activation_depends_on_its_place_in_the_batch() -> None:
    """Why `workers.threads` ends at 2. Half a batch of the sizes that models have is a whole number of vectors; a third is not."""
    generator = torch.Generator().manual_seed(0)
    copies = [torch.stack([torch.randn((320, 8, 8), generator=generator) * 3] * 4) for _ in range(20)]

    def places_agree(threads: int) -> bool:
        torch.set_num_threads(threads)
        activated = [torch.nn.functional.silu(batch) for batch in copies]
        return all(torch.equal(batch[0], batch[k]) for batch in activated for k in range(1, 4))

    try:
        assert places_agree(1)
        assert places_agree(2)
        assert not places_agree(3)
        assert not places_agree(4)
    finally:
        torch.set_num_threads(1)


def test_two_threads_share_whole_samples_only() -> None:
    """On CPUs with AVX-512, B=3 on two threads gave 19 of 104 rows of the tiny SD and SDXL other pixels, B=6 the last two places
    of calls without guidance, B=4, 8 and 12 none but at 8×8 pixels."""
    for size in (1, 2, 8, 12, "auto"):
        Workers(threads=2, batch_size=size)  # type: ignore[arg-type]
    for size, advised in ((3, 4), (6, 8), (10, 12)):
        with pytest.raises(ValueError, match=rf"cannot share a batch_size of {size} evenly.*use batch_size {advised}"):
            Workers(threads=2, batch_size=size)


def test_a_job_with_more_than_two_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 2"):
        Workers(threads=3)
