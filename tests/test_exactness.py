"""A sample's pixels are those of diffusers' own pipeline called with B copies of its row, whatever its mates."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import diffusers
import numpy as np
import pytest
import torch
from covering import only
from oracle import REFERENCE, B, Model, plain_pipeline, reference

from renderfarm.config import ModelSpec, Workers
from renderfarm.models import pipeline
from renderfarm.models.catalog import describe
from renderfarm.models.common import count_texts
from renderfarm.models.load import load_model
from renderfarm.records import Sample, SampleKey
from renderfarm.samplers import SAMPLERS, make_scheduler
from renderfarm.slots import Rendered, SlotLoop

WORKERS = Workers(batch_size=B)
INFO = describe(ModelSpec(id="builtin:shapes"))

LEGAL = [name for name, sampler in SAMPLERS.items() if sampler.kind == INFO.kind]


@pytest.fixture(scope="module")
def pipe() -> diffusers.StableDiffusionPipeline:
    return plain_pipeline(diffusers.StableDiffusionPipeline, INFO.folder)


@pytest.fixture(scope="module")
def slots():
    loop = SlotLoop(lambda: load_model(INFO, WORKERS))
    loop.ready.result()
    yield loop
    loop.close()


def sample(
    row: int, sampler: str, *, seed: int = 7, steps: int = 5, guidance: float = 4.5, side: tuple[int, int] = (64, 64), **words: str
) -> Sample:
    return Sample(
        key=SampleKey(row, 0),
        row_id=str(row),
        prompt=words.get("prompt", "a large red circle on a blue background"),
        negative_prompt=words.get("negative_prompt"),
        seed=seed,
        height=side[0],
        width=side[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
    )


def rendered(futures: list[Future[Rendered]]) -> list[np.ndarray]:
    return [future.result(timeout=300).pixels for future in futures]


def test_the_reference_covers_every_sampler_offered() -> None:
    assert set(REFERENCE) == set(LEGAL)


@pytest.mark.parametrize("sampler", only(LEGAL[::5], LEGAL))  # the mixed batch has all
def test_pixels_equal_those_of_diffusers_own_pipeline(sampler: str, pipe: diffusers.StableDiffusionPipeline, slots: SlotLoop) -> None:
    ours = rendered(slots.submit([sample(0, sampler)]))[0]
    np.testing.assert_array_equal(ours, reference(pipe, sample(0, sampler)))


def mixed_rows() -> list[Sample]:
    """Samplers, steps, guidance (on and off), negatives, sizes and seeds, all different."""
    rows, colours = [], ("red", "green", "blue", "yellow", "purple")
    for row, sampler in enumerate(LEGAL):
        rows.append(
            sample(
                row,
                sampler,
                seed=100 + row,
                steps=3 + row % 4,
                guidance=(1.0, 3.0, 5.0, 7.5)[row % 4],
                side=((64, 64), (64, 64), (72, 64))[row % 3],
                prompt=f"a small {colours[row % 5]} star",
                **({"negative_prompt": "a square"} if row % 2 else {}),
            )
        )
    return rows


@pytest.fixture(scope="module")
def mixed(slots: SlotLoop) -> list[np.ndarray]:
    """What comes of the mixed rows."""
    return rendered(slots.submit(mixed_rows()))


def test_a_mixed_batch_gives_each_row_the_pixels_that_diffusers_gives_it_alone(
    pipe: diffusers.StableDiffusionPipeline, mixed: list[np.ndarray]
) -> None:
    for row, ours in zip(mixed_rows(), mixed, strict=True):
        np.testing.assert_array_equal(ours, reference(pipe, row), err_msg=row.sampler)


def test_order_and_mates_move_no_pixel(slots: SlotLoop, mixed: list[np.ndarray]) -> None:
    rows = mixed_rows()
    second = rendered(slots.submit(rows[::-1]))[::-1]
    few = rendered(slots.submit(rows[::5]))
    for a, b in zip(mixed, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(mixed[::5], few, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_global_random_state_is_neither_read_nor_needed(slots: SlotLoop, mixed: list[np.ndarray]) -> None:
    torch.manual_seed(12345)
    np.random.seed(12345)
    for a, b in zip(mixed[::3], rendered(slots.submit(mixed_rows()[::3])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_batch_size_is_another_profile_and_says_so() -> None:
    model = load_model(INFO, Workers(batch_size=2))
    assert model.profile()["batch_size"] == 2
    assert model.profile()["weights"]["unet/diffusion_pytorch_model.safetensors"]


def test_each_distinct_text_is_encoded_once(slots: SlotLoop) -> None:
    before = slots.counters.encoded_texts
    rendered(slots.submit([sample(k, "euler", seed=k, prompt="a text never seen before") for k in range(7)]))
    assert slots.counters.encoded_texts == before + 1


def test_twenty_prompts_with_fifty_seeds_are_encoded_and_counted_as_twenty(
    model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[torch.Tensor] = []
    counted: list[str] = []
    made: list[str] = []
    monkeypatch.setattr(pipeline, "count_texts", lambda texts, readers: counted.extend(texts) or count_texts(texts, readers))
    monkeypatch.setattr(pipeline, "make_scheduler", lambda name, config: made.append(name) or make_scheduler(name, config))
    loop = SlotLoop(lambda: load_model(model("sd").info, Workers(batch_size=8)))
    encoder = loop.ready.result().pipe.text_encoder  # type: ignore[attr-defined]
    encoder.register_forward_pre_hook(lambda module, args: called.append(args[0]))
    words = [f"{colour} {shape}" for colour in ("red", "blue", "green", "pink") for shape in ("dot", "bar", "star", "ring", "box")]
    rendered(loop.submit([sample(k, "euler", seed=k, steps=1, side=(16, 16), prompt=words[k // 50]) for k in range(1000)]))
    loop.close()
    assert len(torch.cat(called).unique(dim=0)) == loop.counters.encoded_texts == 20 + 1  # the empty text, to be guided away from
    assert len(called) == 3, "B texts go through the encoder at once, also those that a part needs later"
    assert sorted(counted) == sorted(["", *words])
    assert made == ["euler"]


def test_guidance_of_one_or_less_runs_without_an_unconditional_pass(slots: SlotLoop) -> None:
    model = slots.ready.result()
    shapes: list[int] = []
    handle = model.pipe.unet.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[0]))  # type: ignore[attr-defined]
    try:
        rendered(slots.submit([sample(0, "euler", guidance=1.0)]))
        assert set(shapes) == {B}
        shapes.clear()
        rendered(slots.submit([sample(0, "euler", guidance=1.01)]))
        assert set(shapes) == {2 * B}
    finally:
        handle.remove()


def test_slots_stay_full_until_the_end(slots: SlotLoop) -> None:
    counters = slots.counters
    calls, useful = counters.denoiser_calls, counters.useful_slots
    rows = [sample(k, ("euler", "dpm++2m", "ddim")[k % 3], seed=k, steps=3 + k % 5) for k in range(20)]
    rendered(slots.submit(rows))
    steps = sum(row.num_inference_steps for row in rows)
    assert counters.useful_slots - useful == steps
    longest = max(row.num_inference_steps for row in rows)
    assert counters.denoiser_calls - calls <= -(-steps // B) + longest
