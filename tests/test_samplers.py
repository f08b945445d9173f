"""Names of samplers: what people type, what DiffusionDB wrote, and the nearest word when neither is known."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from renderfarm.errors import InvalidInput
from renderfarm.models.catalog import refused_by_configuration
from renderfarm.samplers import DIFFUSIONDB_CODES, SAMPLERS, Kind, find_sampler, make_scheduler

WORDS = [(word, sampler.name) for sampler in SAMPLERS.values() for word in (sampler.name, *sampler.aliases)]


def plain(word: str) -> str:
    return "".join(sign for sign in word.lower().replace("dpmpp", "dpm++") if sign not in " _-")


@pytest.mark.parametrize(("word", "name"), WORDS)
def test_every_name_and_alias_finds_its_sampler_in_any_spelling(word: str, name: str) -> None:
    for spelling in (word, word.upper(), word.replace("_", " "), word.replace("-", "_"), f" {word} ", word.replace("dpm++", "dpmpp")):
        assert find_sampler(spelling, SAMPLERS[name].kind).name == name, spelling


@pytest.mark.parametrize(
    "own",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
    ids=str,
)
def test_a_sampler_runs_under_a_models_own_scheduler_configuration_or_is_refused(own: dict[str, Any]) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, **own}
    refused = refused_by_configuration("StableDiffusionPipeline", config)
    failed = set()
    for name in (name for name, sampler in SAMPLERS.items() if sampler.kind == "diffusion"):
        scheduler = make_scheduler(name, config)
        scheduler.set_timesteps(5)
        latents = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
        try:
            for t in scheduler.timesteps:
                latents = scheduler.step(scheduler.scale_model_input(latents, t) / 2, t, latents, return_dict=False)[0]
        except (NotImplementedError, ValueError):  # how diffusers' schedulers say that they do not take a configuration
            failed.add(name)
        assert torch.isfinite(latents).all()
    assert failed == set(refused)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_aliases_are_whole_words(sampler: object) -> None:
    aliases = sampler.aliases  # type: ignore[attr-defined]
    assert isinstance(aliases, tuple)
    assert all(len(alias) > 2 for alias in aliases)


def test_no_spelling_means_two_samplers() -> None:
    owners: dict[str, set[str]] = {}
    for word, name in WORDS:
        owners.setdefault(plain(word), set()).add(name)
    assert [word for word, names in owners.items() if len(names) > 1] == []


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("DPM++ 2M Karras", "dpm++2m-karras"),
        ("dpmpp_2m_sde", "dpm++2m-sde"),
        ("dpmpp_sde", "dpm++sde"),
        ("Euler a", "euler-a"),
        ("k_euler_ancestral", "euler-a"),
        ("PLMS", "pndm"),
        ("UniPC", "unipc"),
    ],
)
def test_the_names_of_other_tools_are_known(word: str, name: str) -> None:
    assert find_sampler(word, "diffusion").name == name


def test_diffusiondbs_codes_are_those_of_its_data_card() -> None:
    found = {code: find_sampler(code, "diffusion").name for code in range(1, 9)}
    assert found == {1: "ddim", 2: "pndm", 3: "euler", 4: "euler-a", 5: "heun", 6: "dpm2", 7: "dpm2-a", 8: "lms"}
    assert set(DIFFUSIONDB_CODES.values()) <= set(SAMPLERS)


@pytest.mark.parametrize("code", [9, 0, -1, 10, 2**40])
def test_a_code_without_a_sampler_is_refused_and_says_what_to_give(code: int) -> None:
    with pytest.raises(InvalidInput, match=rf"sampler code {code} .*codes 1 to 8.*renderfarm samplers"):
        find_sampler(code, "diffusion")


@pytest.mark.parametrize(
    ("word", "nearest"), [("eular", "euler"), ("dpm++2mm", "dpm++2m"), ("ddimm", "ddim"), ("unipcc", "unipc"), ("eulera2", "euler-a")]
)
def test_an_unknown_name_is_refused_with_the_nearest_one(word: str, nearest: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        find_sampler(word, "diffusion")
    assert f"unknown sampler {word!r}; did you mean '{nearest}'?" in str(caught.value)
    assert "renderfarm samplers" in str(caught.value)


@pytest.mark.parametrize("word", ["", " ", "_", "-", "d", "p", "m", "s", "e", "1", "9", "\x00", "☃"])
def test_a_blank_or_a_single_letter_is_no_sampler(word: str) -> None:
    with pytest.raises(InvalidInput, match="unknown sampler"):
        find_sampler(word, "diffusion")


@given(st.text(max_size=30))
def test_any_text_is_a_known_spelling_or_refused(text: str) -> None:
    known = {plain(word) for word, name in WORDS if SAMPLERS[name].kind == "diffusion"}
    if plain("".join(text.split())) in known:
        assert find_sampler(text, "diffusion").name in SAMPLERS
        return
    with pytest.raises(InvalidInput) as caught:
        find_sampler(text, "diffusion")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.kind != "own"])
def test_a_sampler_for_the_other_kind_of_model_is_refused_with_one_that_is_legal(name: str) -> None:
    other: Kind = "flow" if SAMPLERS[name].kind == "diffusion" else "diffusion"
    with pytest.raises(InvalidInput, match="it would paint nonsense") as caught:
        find_sampler(name, other)
    legal = str(caught.value).rpartition("use ")[2].strip("'")
    assert find_sampler(legal, other).kind == other


def test_the_nearest_legal_sampler_is_the_one_that_people_would_expect() -> None:
    for name, near in {"euler": "flow-euler", "dpm++2m-karras": "flow-dpm++2m", "unipc": "flow-unipc"}.items():
        with pytest.raises(InvalidInput, match=f"use '{re.escape(near)}'"):
            find_sampler(name, "flow")
    with pytest.raises(InvalidInput, match="use 'euler'"):
        find_sampler("flow-euler", "diffusion")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DPMSolverSDE", "global random state"),
        ("flow_lcm", "global random state"),
        ("Flow Heun", "fails"),
        ("DPM++ 2S a Karras", "not in diffusers"),
        ("DPM++ 3M SDE", "not in diffusers"),
        ("DPM adaptive", "not in diffusers"),
        ("Restart", "not in diffusers"),
        ("SASolver", "not compared"),
    ],
)
def test_samplers_of_diffusers_that_are_not_exact_are_refused_with_the_reason(name: str, reason: str) -> None:
    for kind in ("diffusion", "flow"):
        with pytest.raises(InvalidInput, match=reason) as caught:
            find_sampler(name, kind)  # type: ignore[arg-type]
        legal = str(caught.value).rpartition(": ")[2].strip("'")
        assert find_sampler(legal, kind).kind == kind  # type: ignore[arg-type]


def test_every_table_line_is_another_scheduler_or_another_setting_of_it() -> None:
    lines = Counter((sampler.scheduler, repr(sorted(sampler.overrides.items()))) for sampler in SAMPLERS.values())
    assert [line for line, count in lines.items() if count > 1] == []
