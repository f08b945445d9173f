"""Names of samplers: what people type, what DiffusionDB wrote, and the nearest word when neither is known."""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import diffusers
import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from renderfarm.errors import InvalidInput
from renderfarm.models.catalog import refused_by_configuration
from renderfarm.samplers import DIFFUSIONDB_CODES, SAMPLERS, Kind, copied, find_sampler, make_scheduler, own_sampler

WORDS = [(word, sampler.name) for sampler in SAMPLERS.values() for word in (sampler.name, *sampler.aliases)]


def plain(word: str) -> str:
    return "".join(sign for sign in word.lower().replace("dpmpp", "dpm++") if sign not in " _-")


@pytest.mark.parametrize(("word", "name"), WORDS)
def test_every_name_and_alias_finds_its_sampler_in_any_spelling(word: str, name: str) -> None:
    for spelling in (word, word.upper(), word.replace("_", " "), word.replace("-", "_"), f" {word} ", word.replace("dpm++", "dpmpp")):
        assert find_sampler(spelling, SAMPLERS[name].kind).name == name, spelling


@pytest.mark.parametrize("clip", [{}, {"clip_sample": True}, {"clip_sample": False}], ids=str)
@pytest.mark.parametrize("own", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("kind", [diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline])
def test_a_scheduler_is_configured_as_diffusers_users_do_it_where_a_model_does_not_say_whether_to_clip(
    kind: Any, own: str, clip: dict[str, bool]
) -> None:
    """Stable Diffusion's pipeline corrects its scheduler's `clip_sample` and `steps_offset`; SDXL's does not."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **clip}
    absent = dict.fromkeys(inspect.signature(kind.__init__).parameters.keys() - {"self", "scheduler"})
    absent |= {"unet": families.unet(), "vae": families.vae()} | {
        name: False for name in absent if name.startswith(("requires_", "force_", "add_"))
    }
    with warnings.catch_warnings(action="ignore"):
        pipe = kind(**absent, scheduler=getattr(diffusers, own).from_config(config))
    for name, wanted in (("ddim", diffusers.DDIMScheduler), ("ddpm", diffusers.DDPMScheduler), ("lcm", diffusers.LCMScheduler)):
        ours, theirs = make_scheduler(name, dict(pipe.scheduler.config)), wanted.from_config(pipe.scheduler.config)
        assert {k: ours.config[k] for k in theirs.config if k[0] != "_"} == {k: v for k, v in theirs.config.items() if k[0] != "_"}


@pytest.mark.parametrize(
    "own",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"_class_name": "SASolverScheduler", "algorithm_type": "data_prediction", "predictor_order": 2},
        {"_class_name": "SASolverScheduler", "algorithm_type": "noise_prediction", "use_karras_sigmas": True},
        {"_class_name": "DPMSolverSDEScheduler", "use_karras_sigmas": True, "noise_sampler_seed": None},
        {"_class_name": "IPNDMScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"},
        {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "use_karras_sigmas": True},
    ],
    ids=str,
)
def test_a_sampler_runs_under_a_models_own_scheduler_configuration_or_is_refused(own: dict[str, Any]) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, **own}
    refused = refused_by_configuration("StableDiffusionPipeline", config)
    for name in (name for name, sampler in SAMPLERS.items() if sampler.kind == "diffusion"):
        scheduler = make_scheduler(name, config)
        taken = inspect.signature(type(scheduler).__init__).parameters
        if "prediction_type" in refused.get(name, ""):
            with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
                five_steps(scheduler)
        else:
            assert torch.isfinite(five_steps(scheduler)).all(), name
            # what a class has no argument for does not fail: it is left out
            left_out = bool(own.get("rescale_betas_zero_snr")) and "rescale_betas_zero_snr" not in taken
            assert (name in refused) == left_out, name


def five_steps(scheduler: Any) -> torch.Tensor:
    scheduler.set_timesteps(5)
    latents = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        latents = scheduler.step(scheduler.scale_model_input(latents, t) / 2, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.kind == "diffusion"])
def test_copies_of_a_scheduler_that_step_in_turns_go_the_way_of_one_that_was_made_anew(name: str) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    wanted, untouched = list(walk(make_scheduler(name, config))), make_scheduler(name, config)
    for _ in range(2):
        ways = list(zip(walk(copied(untouched)), walk(copied(untouched)), strict=True))
        assert len(ways) == len(wanted)
        for one, other, alone in zip(*zip(*ways, strict=True), wanted, strict=True):
            assert torch.equal(one, alone)
            assert torch.equal(other, alone)


def walk(scheduler: Any) -> Iterator[torch.Tensor]:
    """Five steps, one at a time."""
    scheduler.set_timesteps(5)
    drawn = {"generator": torch.Generator().manual_seed(0)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        latents = scheduler.step(scheduler.scale_model_input(latents, t) / 2, t, latents, return_dict=False, **drawn)[0]
        yield latents


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
        ("k_dpmpp_2m", "dpm++2m"),
        ("k_dpmpp_2m_ka", "dpm++2m-karras"),
        ("sample_dpmpp_2m", "dpm++2m"),
        ("k_dpmpp_sde", "dpm++sde"),
        ("k_dpmpp_sde_ka", "dpm++sde-karras"),
        ("k_dpmpp_2m_sde", "dpm++2m-sde"),
        ("k_dpmpp_2m_sde_ka", "dpm++2m-sde-karras"),
        ("dpm_2_ancestral", "dpm2-a"),
        ("k_dpm_2_a_ka", "dpm2-a-karras"),
        ("dpm_2_ancestral_karras", "dpm2-a-karras"),
        ("k_lms_ka", "lms-karras"),
        ("k_heun_karras", "heun-karras"),
        ("sample_euler_ancestral", "euler-a"),
    ],
)
def test_the_names_of_other_tools_are_known(word: str, name: str) -> None:
    assert find_sampler(word, "diffusion").name == name


PLAIN_OF = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "DPMSolverSinglestepScheduler": "dpm++2s",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2-a",
    "LMSDiscreteScheduler": "lms",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}


def test_a_class_of_diffusers_is_the_plain_sampler_of_that_class() -> None:
    assert set(PLAIN_OF) == {sampler.scheduler for sampler in SAMPLERS.values() if sampler.kind == "diffusion"}
    for class_name, name in PLAIN_OF.items():
        for word in (class_name, class_name.removesuffix("Scheduler"), class_name.lower()):
            assert find_sampler(word, "diffusion").name == name
    of_flow = {"FlowMatchEulerDiscrete": "flow-euler", "DPMSolverMultistep": "flow-dpm++2m", "UniPCMultistep": "flow-unipc"}
    assert {word: find_sampler(f"{word}Scheduler", "flow").name for word in of_flow} == of_flow
    with pytest.raises(InvalidInput, match="euler is for diffusion models, and this is a flow model"):
        find_sampler("EulerDiscreteScheduler", "flow")


@pytest.mark.parametrize(
    ("word", "kind", "nearest"),
    [
        ("DPMSolverSDE", "diffusion", "dpm++sde"),
        ("DPMSolverSDEScheduler", "diffusion", "dpm++sde"),
        ("SASolverScheduler", "diffusion", "dpm++2m-sde"),
        ("IPNDMScheduler", "diffusion", "pndm"),
        ("EDMEulerScheduler", "diffusion", "euler"),
        ("EDMDPMSolverMultistepScheduler", "diffusion", "dpm++2m"),
        ("FlowMatchLCMScheduler", "flow", "flow-euler"),
        ("FlowMatchHeunDiscreteScheduler", "flow", "flow-euler"),
        ("DPM++ 3M SDE", "diffusion", "dpm++2m-sde"),
        ("DPM++ 3M SDE Karras", "diffusion", "dpm++2m-sde-karras"),
        ("DPM++ 3M SDE Exponential", "diffusion", "dpm++2m-sde"),
        ("k_dpmpp_3m_sde", "diffusion", "dpm++2m-sde"),
        ("DPM++ 2M SDE Heun", "diffusion", "dpm++2m-sde"),
        ("k_dpmpp_2m_sde_heun", "diffusion", "dpm++2m-sde"),
        ("DPM++ 2M SDE Heun Karras", "diffusion", "dpm++2m-sde-karras"),
        ("DPM++ 2M SDE Heun Exponential", "diffusion", "dpm++2m-sde"),
        ("k_dpmpp_2m_sde_exp", "diffusion", "dpm++2m-sde"),
        ("DPM++ 2M SGM Uniform", "diffusion", "dpm++2m"),
        ("Euler a Karras", "diffusion", "euler-a"),
        ("UniPC Karras", "diffusion", "unipc"),
        ("dpmpp_2s_ancestral", "diffusion", "dpm++2s"),
        ("k_dpmpp_2s_a_ka", "diffusion", "dpm++2s"),
        ("k_dpm_fast", "diffusion", "dpm"),
        ("dpm_adaptive", "diffusion", "dpm"),
        ("k_dpm_ad", "diffusion", "dpm"),
        ("Restart", "diffusion", "heun"),
        ("flow-dpm++2m", "diffusion", "dpm++2m"),
        ("flow-unipc", "diffusion", "unipc"),
        ("DPM++ 3M SDE", "flow", "flow-dpm++2m"),
    ],
)
def test_a_sampler_without_an_exact_equivalent_is_refused_with_the_nearest_one(word: str, kind: Kind, nearest: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        find_sampler(word, kind)
    assert "unknown" not in str(caught.value)
    assert str(caught.value).endswith(f"; use '{nearest}'")


def test_where_the_nearest_sampler_is_refused_too_the_legal_one_most_like_it_is_named() -> None:
    refused = {"dpm++2m-sde": "it does not fit"}
    with pytest.raises(InvalidInput, match=r"use 'dpm\+\+2m'$"):
        find_sampler("SASolver", "diffusion", refused)
    with pytest.raises(InvalidInput, match=r"it does not fit; use 'dpm\+\+2m'$"):
        find_sampler("dpm++2m-sde", "diffusion", refused)
    none = {name: "it does not fit" for name, sampler in SAMPLERS.items() if sampler.kind == "flow"}
    with pytest.raises(InvalidInput, match=r"no other one can render it either$"):
        find_sampler("flow-euler", "flow", none)


# configurations of models' own schedulers that say what another line of the class means
TELLING = [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, "dpm++2m-sde-karras"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpm++2m-sde"),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpm++2m-karras"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "dpm"),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}, "dpm++2m"),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpm++sde"),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, "dpm++sde-karras"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}, "euler-karras"),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "heun-karras"),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, "dpm2-karras"),
    ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}, "dpm2-a-karras"),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}, "lms-karras"),
    # what no line means exactly
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}, "dpm++2m"),
    ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}, "dpm++2s"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "euler"),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, "unipc"),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}, "deis"),
    ("EulerAncestralDiscreteScheduler", {}, "euler-a"),
]


@pytest.mark.parametrize(("class_name", "options", "name"), TELLING)
def test_the_sampler_of_a_models_own_scheduler_is_what_its_configuration_says(class_name: str, options: dict[str, Any], name: str) -> None:
    class_ = getattr(diffusers, class_name)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    own = class_.from_config({"_class_name": class_name, **betas, **options})
    for config in (dict(own.config), {"_class_name": class_name, **betas, **options}):  # as loaded, and as the file has it
        found = own_sampler(class_name, config, "diffusion")
        assert found is not None
        assert found.name == name
        ours = make_scheduler(name, config)
        keys = inspect.signature(class_.__init__).parameters.keys() - {"self"}
        assert {key: ours.config[key] for key in keys} == {key: own.config[key] for key in keys}


def test_samplers_whose_class_would_leave_a_zero_snr_schedule_out_are_refused_under_one() -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config: dict[str, Any] = {**betas, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    refused = refused_by_configuration("StableDiffusionPipeline", config)
    for name, sampler in SAMPLERS.items():
        if sampler.kind == "diffusion":
            takes = "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, sampler.scheduler).__init__).parameters
            assert (name in refused) != takes, name
            hidden = float(make_scheduler(name, config).alphas_cumprod[-1]) < 1e-3
            assert hidden == takes, name
    assert not refused_by_configuration("StableDiffusionPipeline", {**config, "rescale_betas_zero_snr": False})


@pytest.mark.parametrize("class_name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_name_means_the_same_under_a_configuration_that_says_another(class_name: str) -> None:
    """The references are written out as a user of diffusers would."""
    config: dict[str, Any] = {"_class_name": class_name, "beta_schedule": "scaled_linear", "algorithm_type": "sde-dpmsolver++"}
    config |= {"use_karras_sigmas": True, "solver_order": 3}
    for name, wanted in {
        "dpm++2m": diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear"),
        "dpm++2m-karras": diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True),
        "dpm++2m-sde": diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++"),
        "dpm++2s": diffusers.DPMSolverSinglestepScheduler(beta_schedule="scaled_linear"),
        "euler": diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        "dpm2": diffusers.KDPM2DiscreteScheduler(beta_schedule="scaled_linear"),
        "unipc": diffusers.UniPCMultistepScheduler(beta_schedule="scaled_linear"),
        "deis": diffusers.DEISMultistepScheduler(beta_schedule="scaled_linear"),
    }.items():
        np.testing.assert_array_equal(path(make_scheduler(name, config)), path(wanted), err_msg=name)


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_flow_solvers_have_flow_times_whatever_noise_levels_the_models_own_scheduler_has(sigmas: str) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, sigmas: True}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for name, class_ in {"flow-dpm++2m": diffusers.DPMSolverMultistepScheduler, "flow-unipc": diffusers.UniPCMultistepScheduler}.items():
        np.testing.assert_array_equal(path(make_scheduler(name, config)), path(class_(**flow)), err_msg=name)


def path(scheduler: Any) -> np.ndarray:
    """Where five steps lead from ones; noise is that of a seed."""
    scheduler.set_timesteps(5)
    latents, generator = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma, torch.Generator().manual_seed(0)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        latents = scheduler.step(scheduler.scale_model_input(latents, t) / 2, t, latents, **draws, return_dict=False)[0]
    assert torch.isfinite(latents).all()
    return latents.numpy()


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
    known = {plain(word): name for word, name in WORDS}
    meant = known.get(plain("".join(text.split())))
    if meant and SAMPLERS[meant].kind == "diffusion":
        assert find_sampler(text, "diffusion").name in SAMPLERS
        return
    with pytest.raises(InvalidInput) as caught:
        find_sampler(text, "diffusion")
    assert (meant or repr(text)) in str(caught.value)


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
        legal = str(caught.value).rpartition("use ")[2].strip("'")
        assert find_sampler(legal, kind).kind == kind  # type: ignore[arg-type]


def test_every_table_line_is_another_scheduler_or_another_setting_of_it() -> None:
    lines = Counter((sampler.scheduler, repr(sorted(sampler.overrides.items()))) for sampler in SAMPLERS.values())
    assert [line for line, count in lines.items() if count > 1] == []
