"""Every family's pixels are those of diffusers' own pipeline called with B copies of the row, for every sampler that is legal."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from covering import covering
from oracle import CALL_FAMILIES, CLASSES, DTYPES, LEGAL, B, Model, pixels, plain_pipeline, row

from renderfarm.config import Workers
from renderfarm.errors import Fatal, NonFiniteOutput
from renderfarm.models.common import initial_noise
from renderfarm.models.load import load_model
from renderfarm.models.measure import check_places
from renderfarm.records import Sample
from renderfarm.samplers import SAMPLERS
from renderfarm.slots import SlotLoop

Models = Callable[..., Model]


def mixed_rows(name: str) -> list[Sample]:
    """Samplers, steps, guidance (on and off), texts of each encoder, sizes and seeds, all different."""
    rows = []
    for number in range(max(8, len(LEGAL[name]))):
        values: dict[str, Any] = {
            "sampler": LEGAL[name][number % len(LEGAL[name])],
            "prompt": f"a {('red', 'green', 'blue')[number % 3]} star {number}" + " and so on" * 5 * (number % 3),
            # Qwen-Image's schedule has no single step: it divides by zero
            "num_inference_steps": max(
                1 + number % 4, 2 if name == "qwen-image" else 1, SAMPLERS[LEGAL[name][number % len(LEGAL[name])]].min_steps
            ),
            "guidance_scale": (1.0, 3.0, 7.5, 0.0)[number % 4],
            "height": (32, 64 if name == "sana" else 40)[number // 3 % 2],
        }
        if name not in ("lcm", "sd-guidance-embedded", "flux2-dev", "flux2-klein-distilled") and number % 2:
            values["negative_prompt"] = ("a square" * (1 + number % 2 * 9), "")[number % 3 == 0]
        if name.startswith(("sdxl", "sd3", "flux-")) and number % 3 == 1:
            values |= {"prompt_2": f"a second text {number}", "negative_prompt_2": "grey"}
        if name.startswith("sd3") and number % 3 == 2:
            values |= {"prompt_3": f"a third text {number}", "negative_prompt_3": "blurred"}
        if name.startswith(("flux-", "qwen")):
            values["true_cfg_scale"] = (None, 2.0, 1.0, 3.5)[number % 4]
        rows.append(row(number, **values))
    return rows


def few(rows: list[Sample]) -> list[Sample]:
    """Six of them, from the first to the last."""
    return [rows[k * (len(rows) - 1) // 5] for k in range(6)]


Many = Callable[[list[Sample]], list[Sample]]
FEW_OR_ALL = [
    *(pytest.param(name, few, id=f"{name}-few") for name in CLASSES),
    *(pytest.param(name, list, marks=pytest.mark.slow, id=f"{name}-all") for name in CLASSES),
]


@pytest.mark.parametrize("name", CLASSES)
def test_the_samplers_compared_here_are_those_offered(name: str, model: Models) -> None:
    info = model(name).info
    offered = {sampler.name for sampler in SAMPLERS.values() if sampler.kind == info.kind} - set(info.refused_samplers)
    assert offered == set(LEGAL[name]) or (name in ("sdxl-plain", "sd-odd-width") and offered > set(LEGAL[name]))


@pytest.mark.parametrize(
    ("name", "sampler", "dtype"),
    # each sampler of each class is in the mixed batches
    covering([(name, sampler, dtype) for name, samplers in LEGAL.items() for sampler in samplers for dtype in DTYPES]),
)
def test_pixels_equal_those_of_diffusers_own_pipeline(
    name: str, sampler: str, dtype: str, model: Models, record_property: Callable[[str, str], None]
) -> None:
    record_property("compared", CLASSES[name].__name__)
    one = model(name, dtype)
    wanted = row(sampler=sampler)
    np.testing.assert_array_equal(one.render([wanted])[0], one.reference(wanted))


@pytest.mark.parametrize(
    ("sampler", "own"),
    [
        ("dpm++2m-sde-karras", diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)),
        ("euler-karras", diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)),
        ("unipc", diffusers.UniPCMultistepScheduler(use_karras_sigmas=True)),
        ("euler", diffusers.EulerDiscreteScheduler(use_exponential_sigmas=True)),
    ],
)
def test_the_default_sampler_gives_the_pixels_of_the_pipeline_as_its_folder_says(
    sampler: str, own: Any, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = plain_pipeline(CLASSES["sd"], tiny_model("sd"))
    pipe.scheduler = own
    pipe.save_pretrained(tmp_path)
    one = Model("sd", tmp_path)
    assert one.info.sampler == sampler
    wanted = row(sampler=one.info.sampler)
    texts, seeds = [wanted.prompt] * B, [torch.Generator("cpu").manual_seed(wanted.seed) for _ in range(B)]
    asked = {"height": wanted.height, "width": wanted.width, "guidance_scale": wanted.guidance_scale}
    found = plain_pipeline(CLASSES["sd"], tmp_path)(texts, num_inference_steps=wanted.num_inference_steps, generator=seeds, **asked)
    try:
        np.testing.assert_array_equal(one.render([wanted])[0], np.asarray(found.images[0]))
    finally:
        one.close()


@pytest.mark.parametrize(("name", "dtype"), covering([(name, dtype) for name in CLASSES for dtype in DTYPES]))
def test_a_mixed_batch_gives_each_row_the_pixels_that_diffusers_gives_it_alone(
    name: str, dtype: str, model: Models, record_property: Callable[[str, str], None]
) -> None:
    record_property("compared", CLASSES[name].__name__)
    one, rows = model(name, dtype), mixed_rows(name)
    for wanted, ours in zip(rows, one.render(rows), strict=True):
        np.testing.assert_array_equal(ours, one.reference(wanted), err_msg=str(wanted))


@pytest.mark.parametrize(("name", "many"), FEW_OR_ALL)
def test_order_and_mates_move_no_pixel(name: str, many: Many, model: Models) -> None:
    one, rows = model(name), many(mixed_rows(name))
    first = one.render(rows)
    for a, b in zip(first, one.render(rows[::-1])[::-1], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(first[::4], one.render(rows[::4]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "dtype"), covering([(name, dtype) for name in CLASSES for dtype in DTYPES]))
def test_a_denoiser_that_tells_places_apart_by_a_bit_is_found_out(name: str, dtype: str, model: Models) -> None:
    one, wanted = model(name, dtype), mixed_rows(name)[1]
    torch.set_num_threads(1)  # of this thread: it is not the one that the slot loop renders in
    check_places(one.adapter, wanted)

    def disturb(_: Any, __: Any, outputs: Any) -> None:
        last = outputs[0][-1]
        value = last[(0,) * last.ndim]  # one number by the least that there is
        value.copy_(torch.nextafter(value, torch.full_like(value, torch.inf)))

    handle = one.denoiser.register_forward_hook(disturb, prepend=True)
    try:
        with pytest.raises(Fatal, match=r"other bits at 1 of 3 places .*set another workers.batch_size"):
            check_places(one.adapter, wanted)
    finally:
        handle.remove()


@pytest.mark.parametrize(("name", "many"), FEW_OR_ALL)
def test_random_numbers_drawn_by_others_between_the_steps_move_no_pixel(name: str, many: Many, model: Models) -> None:
    one, rows = model(name), many(mixed_rows(name))
    quiet, calls = one.render(rows), 0

    def disturb(*_: Any) -> None:
        nonlocal calls
        calls += 1
        torch.manual_seed(calls)
        np.random.seed(calls)
        random.seed(calls)

    handle = one.denoiser.register_forward_hook(disturb)
    try:
        disturbed = one.render(rows)
    finally:
        handle.remove()
    assert calls > 3
    for a, b in zip(quiet, disturbed, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["lcm", "flux-dev"])
def test_a_model_that_is_loaded_beside_the_rendering_moves_no_pixel(name: str, model: Models) -> None:
    """Loading sets torch's default dtype for the whole process, and each model's tensors are made with it."""
    one, rows = model(name, "bfloat16"), mixed_rows(name)
    quiet = one.render(rows)
    futures = [future for _ in range(4) for future in one.loop.submit(rows)]
    loaded = 0
    while not all(future.done() for future in futures):
        beside = SlotLoop(lambda: load_model(one.info, one.workers))
        beside.ready.result(timeout=60)
        beside.close()
        loaded += 1
    assert loaded > 1
    for place, ours in enumerate(pixels(futures)):
        np.testing.assert_array_equal(ours, quiet[place % len(rows)], err_msg=str(rows[place % len(rows)]))


@pytest.mark.parametrize("name", ["sd", "lcm", "sdxl", "sd3", "flux-dev"])
def test_with_two_threads_the_reference_is_diffusers_with_two_threads(name: str, tiny_model: Callable[[str], Path]) -> None:
    one = Model(name, tiny_model(name), threads=2, batch_size=4)
    rows = [replace(wanted, height=64, width=64) for wanted in few(mixed_rows(name))]
    try:
        for wanted, ours in zip(rows, one.render(rows), strict=True):
            np.testing.assert_array_equal(ours, one.reference(wanted), err_msg=str(wanted))
    finally:
        one.close()
        torch.set_num_threads(1)


@pytest.mark.parametrize("sampler", ["euler", "euler-a"])
def test_in_float16_the_autoencoder_of_sdxl_computes_in_float32_as_in_the_pipeline(sampler: str, model: Models) -> None:
    one = model("sdxl", "float16")
    assert one.adapter.pipe.vae.dtype == torch.float32
    wanted = row(sampler=sampler, negative_prompt="grey")
    np.testing.assert_array_equal(one.render([wanted])[0], one.reference(wanted))


def painting(one: Model, monkeypatch: pytest.MonkeyPatch, value: float, whole: bool) -> None:
    """From now on the first picture of each batch has this value in its first place, or in all."""
    if one.name == "deepfloyd":  # without an autoencoder: what its pictures end in
        step = diffusers.DDPMScheduler.step

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            (image, *others) = step(*args, **kwargs)
            (image[0] if whole else image[0, 0, 0, 0]).fill_(value)
            return image, *others

        monkeypatch.setattr(diffusers.DDPMScheduler, "step", spoiled)
        return
    vae = one.adapter.pipe.vae
    decode = vae.decode

    def decoded(*args: Any, **kwargs: Any) -> Any:
        found = decode(*args, **kwargs)
        (found[0][0] if whole else found[0][(0,) * found[0].ndim]).fill_(value)
        return found

    monkeypatch.setattr(vae, "decode", decoded)


@pytest.mark.parametrize(("name", "value"), covering([(name, float(value)) for name in CLASSES for value in ("nan", "inf", "-inf")]))
def test_a_picture_that_is_not_finite_is_an_error_and_no_white_or_black_spot(
    name: str, value: float, model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, wanted = model(name), row(sampler="ddpm" if name == "deepfloyd" else LEGAL[name][0])
    assert one.render([wanted])
    painting(one, monkeypatch, value, whole=False)
    with pytest.raises(NonFiniteOutput, match="NaN or infinite"):
        one.render([wanted])


@pytest.mark.parametrize("name", ["sd", "flux-dev", "sana", "deepfloyd"])
def test_a_wholly_black_picture_is_an_error(name: str, model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(name)
    painting(one, monkeypatch, -1.0, whole=True)
    with pytest.raises(NonFiniteOutput, match="wholly black"):
        one.render([row(sampler="ddpm" if name == "deepfloyd" else LEGAL[name][0])])


def denoiser_batches(one: Model, rows: list[Sample]) -> list[int]:
    seen: list[int] = []

    def note(_: Any, positional: Any, named: Any) -> None:
        seen.append((positional[0] if positional else named["hidden_states"]).shape[0])

    handle = one.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        one.render(rows)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "off", "on", "batches"),
    [
        ("sdxl", {"guidance_scale": 1.0}, {"guidance_scale": 1.01}, [2 * B] * 3),
        ("sd3", {"guidance_scale": 1.0, "negative_prompt": "x"}, {"guidance_scale": 1.01}, [2 * B] * 3),
        ("flux-dev", {"true_cfg_scale": 3.0}, {"true_cfg_scale": 3.0, "negative_prompt": ""}, [B] * 6),
        ("flux-dev", {"true_cfg_scale": 1.0, "negative_prompt": "x"}, {"true_cfg_scale": 1.01, "negative_prompt": "x"}, [B] * 6),
    ],
)
def test_guidance_costs_a_second_prediction_only_where_it_is_on(name: str, off: Any, on: Any, batches: list[int], model: Models) -> None:
    usual = row(sampler=LEGAL[name][0])
    assert denoiser_batches(model(name), [replace(usual, **off)]) == [B] * 3
    assert denoiser_batches(model(name), [replace(usual, **on)]) == batches


@pytest.mark.parametrize("name", ["lcm", "sd-guidance-embedded"])
def test_guidance_as_an_embedding_never_costs_a_second_prediction_and_still_tells(name: str, model: Models) -> None:
    rows = [row(sampler="lcm", guidance_scale=8.5), row(sampler="lcm", guidance_scale=2.0)]
    assert denoiser_batches(model(name), rows) == [B] * 3
    a, b = model(name).render(rows)
    assert (a != b).mean() > 0.5


BLENDED = [("sd", "euler-a"), ("sdxl", "dpm++sde"), ("flux-dev", "flow-unipc"), ("pixart-sigma", "euler-a")]


@pytest.mark.parametrize(("name", "sampler"), [*((name, LEGAL[name][0]) for name in CLASSES), *BLENDED])
def test_a_blend_of_seeds_ends_at_both_of_them_bit_for_bit(name: str, sampler: str, model: Models) -> None:
    wanted = row(sampler=sampler, seed=5)
    blends = [replace(wanted, seed_b=9, blend=at) for at in (0.0, 0.5, 1.0)]
    five, nine, at_0, at_half, at_1 = model(name).render([wanted, replace(wanted, seed=9), *blends])
    np.testing.assert_array_equal(at_0, five)
    np.testing.assert_array_equal(at_1, nine)
    assert (at_half != five).mean() > 0.5
    assert (at_half != nine).mean() > 0.5


def test_a_blend_of_noises_is_as_strong_as_noise() -> None:
    for at in (0.0, 0.3, 0.5, 1.0):
        noise, _ = initial_noise(row(sampler="euler", seed_b=9, blend=at), (1, 4, 64, 64), "cpu", torch.float32)
        assert abs(noise.std().item() - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "length", "per_letter"),
    [
        *[("sd", 77, 1), ("lcm", 77, 1), ("sdxl", 77, 1), ("sd3", 256, 1), ("sd3-dynamic", 77, 1), ("flux-dev", 512, 1)],
        *[("pixart-sigma", 300, 1), ("sana", 300, 1), ("deepfloyd", 77, 1)],
    ],
)
def test_the_tokens_that_count_are_those_of_the_text_encoder_that_reads_most(
    name: str, length: int, per_letter: int, model: Models
) -> None:
    adapter = model(name).adapter
    short = adapter.count_tokens(row(sampler="euler", prompt="x" * 40))
    assert 40 <= short.tokens <= 43  # Gemma's tiny one adds no mark
    assert short.cut_off is None
    long = adapter.count_tokens(row(sampler="euler", prompt="x" * 600))
    assert 600 <= long.tokens <= 603
    assert length - 4 <= 600 - len(long.cut_off) <= length


@pytest.mark.parametrize("name", CALL_FAMILIES)
def test_a_prompt_is_cut_off_where_the_pipeline_cuts_it(name: str, model: Models) -> None:
    """Seen by what it reads: letters after the cut move no pixel, the last one before it does."""
    one, usual = model(name), row(sampler=LEGAL[name][0], num_inference_steps=2)
    short = one.adapter.count_tokens(replace(usual, prompt="x" * 40))
    assert (40 <= short.tokens <= 42, short.cut_off) == (True, None)
    long = one.adapter.count_tokens(replace(usual, prompt="x" * 600))
    assert 600 <= long.tokens <= 602
    kept = 600 - len(long.cut_off)
    assert 0 < kept < 513
    prompts = ["x" * 600, "x" * kept + "y" * (600 - kept), "x" * (kept - 1) + "y" * (601 - kept)]
    whole, after, before = one.render([replace(usual, prompt=prompt) for prompt in prompts])
    np.testing.assert_array_equal(whole, after)
    assert (whole != before).any()


@pytest.mark.parametrize(
    ("name", "arguments", "cut_off"),
    [
        ("flux-dev", {"prompt": "x" * 100}, None),  # CLIP does not see its end, T5 does
        ("flux-dev", {"prompt": "x" * 100, "prompt_2": "short"}, 100 - 75),  # now only CLIP reads it
        ("flux-dev", {"prompt": "short", "prompt_2": "x" * 600}, 600 - 510),
        ("sd3", {"prompt": "x" * 100}, None),
        ("sd3", {"prompt": "x" * 100, "prompt_3": "short"}, 100 - 75),
        ("sd3", {"prompt": "short", "prompt_2": "x" * 100}, 100 - 75),
        ("sd3", {"prompt": "short", "prompt_3": "x" * 100}, None),
        ("sd3-dynamic", {"prompt": "short", "prompt_2": "x" * 100}, 100 - 75),
        ("sdxl", {"prompt": "short", "prompt_2": "x" * 100}, 100 - 75),
    ],
)
def test_a_text_is_cut_off_where_none_of_its_readers_sees_the_end(
    name: str, arguments: dict[str, Any], cut_off: int | None, model: Models
) -> None:
    found = model(name).adapter.count_tokens(row(sampler="euler", **arguments)).cut_off
    assert found == (None if cut_off is None else "x" * cut_off)


@pytest.mark.parametrize(
    ("name", "arguments", "cut_off"),
    [
        ("sd", {"negative_prompt": "y" * 100}, 100 - 75),
        ("sd", {"negative_prompt": "y" * 75}, None),
        ("sd", {"negative_prompt": "y" * 100, "guidance_scale": 1.0}, None),  # it is not read at all
        ("sdxl", {"negative_prompt": "short", "negative_prompt_2": "y" * 100}, 100 - 75),
        ("sdxl", {}, None),
        ("sd3", {"negative_prompt": "y" * 300}, 300 - 254),
        ("sd3", {"negative_prompt": "y" * 300, "negative_prompt_3": "short"}, 300 - 75),
        ("flux-dev", {"negative_prompt": "y" * 600, "true_cfg_scale": 2.0}, 600 - 510),
        ("flux-dev", {"negative_prompt": "y" * 600}, None),
    ],
)
def test_the_end_of_a_negative_prompt_that_is_not_seen_is_told_where_it_is_read(
    name: str, arguments: dict[str, Any], cut_off: int | None, model: Models
) -> None:
    counted = model(name).adapter.count_tokens(row(sampler="euler", prompt="x", **{"guidance_scale": 5.0, **arguments}))
    assert counted.cut_off is None
    assert counted.negative_cut_off == (None if cut_off is None else "y" * cut_off)


def test_the_profile_names_what_decides_pixels(model: Models) -> None:
    profile = model("flux-dev").adapter.profile()
    assert profile["text_length"] == 512
    assert profile["scheduler"]["use_dynamic_shifting"] is True
    assert profile["safety_checker"] is False
    assert {"transformer/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"} <= set(profile["weights"])


def test_another_batch_size_is_another_profile(model: Models) -> None:
    profiles = [load_model(model("sd3").info, Workers(batch_size=size)).profile()["batch_size"] for size in (2, 5)]
    assert profiles == [2, 5]
