"""The sampler table: the names people use, and the diffusers scheduler behind each.

One line per sampler. `overrides` are applied on top of the model's own scheduler configuration, as
`Scheduler.from_config(pipe.scheduler.config, **overrides)` does. Importing this module imports no torch;
`make_scheduler` does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from renderfarm.errors import InvalidInput

Kind = Literal["diffusion", "flow", "own"]


@dataclass(frozen=True)
class Sampler:
    """`draws`: takes fresh noise at its steps, from the sample's own generator (ancestral and SDE kinds).

    `kind`: what the model must have been trained for, diffusion (noise or v at a timestep) or flow (a velocity at a time
    between picture and noise). The other kind's samplers run, too, and paint nonsense. own: nobody knows what the model
    was trained for, and its own scheduler is the only one.
    """

    name: str
    scheduler: str
    overrides: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    draws: bool = False
    min_steps: int = 1
    max_steps: int = 998  # of 1000 training steps; at 999 and 1000 half of the schedulers fail or give NaN
    kind: Kind = "diffusion"


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_FLOW_DPM = {**_FLOW, "algorithm_type": "dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}  # instead of the model's own
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_TABLE = (
    Sampler("ddpm", "DDPMScheduler", draws=True),
    Sampler("ddim", "DDIMScheduler"),
    Sampler("pndm", "PNDMScheduler", {"skip_prk_steps": True}, ("plms", "k_plms")),
    Sampler("dpm", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, ("dpm-solver",)),
    Sampler("dpm++2m", "DPMSolverMultistepScheduler", aliases=("dpmpp_2m", "dpmsolver++")),
    Sampler("dpm++2m-karras", "DPMSolverMultistepScheduler", _KARRAS, ("dpmpp_2m_karras",)),
    Sampler("dpm++2m-sde", "DPMSolverMultistepScheduler", _SDE, ("dpmpp_2m_sde",), draws=True),
    Sampler("dpm++2m-sde-karras", "DPMSolverMultistepScheduler", {**_SDE, **_KARRAS}, ("dpmpp_2m_sde_karras",), draws=True),
    Sampler("dpm++2s", "DPMSolverSinglestepScheduler", aliases=("dpmpp_2s", "dpm++singlestep"), min_steps=2),
    Sampler("dpm++sde", "DPMSolverSinglestepScheduler", _SDE, ("dpmpp_sde",), draws=True, min_steps=2),
    Sampler("dpm++sde-karras", "DPMSolverSinglestepScheduler", {**_SDE, **_KARRAS}, ("dpmpp_sde_karras",), draws=True, min_steps=2),
    Sampler("euler", "EulerDiscreteScheduler", aliases=("k_euler",)),
    Sampler("euler-karras", "EulerDiscreteScheduler", _KARRAS),
    Sampler("euler-a", "EulerAncestralDiscreteScheduler", aliases=("k_euler_a", "k_euler_ancestral", "euler_ancestral"), draws=True),
    Sampler("heun", "HeunDiscreteScheduler", aliases=("k_heun",)),
    Sampler("heun-karras", "HeunDiscreteScheduler", _KARRAS),
    Sampler("dpm2", "KDPM2DiscreteScheduler", aliases=("k_dpm_2",)),
    Sampler("dpm2-karras", "KDPM2DiscreteScheduler", _KARRAS),
    Sampler("dpm2-a", "KDPM2AncestralDiscreteScheduler", aliases=("k_dpm_2_a", "k_dpm_2_ancestral", "dpm_2_ancestral"), draws=True),
    Sampler("dpm2-a-karras", "KDPM2AncestralDiscreteScheduler", _KARRAS, draws=True),
    Sampler("lms", "LMSDiscreteScheduler", aliases=("k_lms",)),
    Sampler("lms-karras", "LMSDiscreteScheduler", _KARRAS),
    Sampler("unipc", "UniPCMultistepScheduler"),
    Sampler("deis", "DEISMultistepScheduler"),
    # distilled models' samplers draw their steps from the 50 that they were distilled on
    Sampler("lcm", "LCMScheduler", draws=True, max_steps=50),
    Sampler("tcd", "TCDScheduler", draws=True, max_steps=50),
    Sampler("flow-euler", "FlowMatchEulerDiscreteScheduler", aliases=("flowmatch_euler", "fm_euler"), kind="flow"),
    Sampler("flow-dpm++2m", "DPMSolverMultistepScheduler", _FLOW_DPM, ("flow_dpmpp_2m",), kind="flow"),
    Sampler("flow-unipc", "UniPCMultistepScheduler", _FLOW, kind="flow"),
    Sampler("default", "the model's own", draws=True, kind="own"),
)  # fmt: skip
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _TABLE}

# Samplers that diffusers has and that are refused here, by each of their usual names: why.
GLOBAL_STATE = "draws its noise from the process's global random state, so its pixels would depend on batch mates and order"
NOT_THERE = "is not in diffusers, or not with the steps that its name promises elsewhere, so its pixels would be another sampler's"
REFUSED: dict[str, tuple[str, str]] = {
    "sasolver": ("was not compared with diffusers' own pipeline here", "dpm++2m-sde"),
    "dpm++ 2s a": (NOT_THERE, "dpm++2s"),
    "dpm++ 2s a karras": (NOT_THERE, "dpm++2s"),
    "dpm++ 3m sde": (NOT_THERE, "dpm++2m-sde"),
    "dpm++ 3m sde karras": (NOT_THERE, "dpm++2m-sde-karras"),
    "dpm fast": (NOT_THERE, "dpm"),
    "dpm adaptive": (NOT_THERE, "dpm"),
    "restart": (NOT_THERE, "heun"),
    "dpmsolversde": (GLOBAL_STATE, "dpm++sde"),
    "flow-heun": ("fails in diffusers for every flow model tried", "flow-euler"),
    "flow-lcm": (GLOBAL_STATE, "flow-euler"),
}

# DiffusionDB's column `sampler`: https://huggingface.co/datasets/poloclub/diffusiondb, "Data Fields"
DIFFUSIONDB_CODES = {1: "ddim", 2: "pndm", 3: "euler", 4: "euler-a", 5: "heun", 6: "dpm2", 7: "dpm2-a", 8: "lms"}


def _spelling(name: str) -> str:
    """`DPM++ 2M Karras`, `dpmpp_2m_karras` and `dpm++2m-karras` are one name."""
    return re.sub(r"[\s_\-]+", "", name.lower().replace("dpmpp", "dpm++"))


NOTHING: Mapping[str, str] = {}
_BY_SPELLING = {_spelling(word): sampler for sampler in _TABLE for word in (sampler.name, *sampler.aliases)}


def find_sampler(name: str | int, kind: Kind, refused: Mapping[str, str] = NOTHING) -> Sampler:
    """The sampler of a name, an alias, or a DiffusionDB code, for models of that kind.

    `refused`: the samplers that the model cannot use although they are of its kind, and why. Raises InvalidInput with
    the reason and the nearest name that is legal.
    """
    if isinstance(name, int):
        if name in DIFFUSIONDB_CODES:
            return _legal(SAMPLERS[DIFFUSIONDB_CODES[name]], kind, refused)
        raise InvalidInput(
            f"sampler code {name} has no exact equivalent: DiffusionDB's codes 1 to 8 name samplers, "
            "9 means an unknown other one; give the row one of `renderfarm samplers`"
        )
    if found := _BY_SPELLING.get(_spelling(name)):
        return _legal(found, kind, refused)
    if inexact := {_spelling(word): reason for word, reason in REFUSED.items()}.get(_spelling(name)):
        raise InvalidInput(f"sampler {name!r} {inexact[0]}; the nearest legal one: {_nearest(inexact[1], kind, refused)!r}")
    legal = [spelling for spelling, sampler in _BY_SPELLING.items() if sampler.kind == kind and sampler.name not in refused]
    close = difflib.get_close_matches(_spelling(name), legal, n=1, cutoff=0.4)
    hint = f"; did you mean {_BY_SPELLING[close[0]].name!r}?" if close else ""
    raise InvalidInput(f"unknown sampler {name!r}{hint} (`renderfarm samplers` lists them)")


def _legal(sampler: Sampler, kind: Kind, refused: Mapping[str, str]) -> Sampler:
    if kind != sampler.kind and "own" in (kind, sampler.kind):
        reason = (
            "was not compared for this class of model, which renders with its own scheduler"
            if kind == "own"
            else "is for classes of models that are not in the table of families"
        )
        raise InvalidInput(f"sampler {sampler.name} {reason}; leave sampler out, or use {_nearest('euler', kind, refused)!r}")
    if sampler.kind != kind:
        raise InvalidInput(
            f"sampler {sampler.name} is for {sampler.kind} models, and this is a {kind} model: it would paint nonsense; "
            f"use {_nearest(sampler.name, kind, refused)!r}"
        )
    if sampler.name in refused:
        raise InvalidInput(
            f"sampler {sampler.name} cannot render this model: {refused[sampler.name]}; use {_nearest(sampler.name, kind, refused)!r}"
        )
    return sampler


def why_not(sampler: Sampler, kind: Kind, refused: Mapping[str, str] = NOTHING) -> str | None:
    """Why a model of that kind cannot use the sampler; None where it can."""
    try:
        _legal(sampler, kind, refused)
    except InvalidInput as error:
        return str(error)
    return None


def _nearest(name: str, kind: Kind, refused: Mapping[str, str]) -> str:
    """The legal sampler with the same scheduler class or the most similar name."""
    wanted = SAMPLERS.get(name)
    legal = [sampler for sampler in _TABLE if sampler.kind == kind and sampler.name not in refused]
    if kin := [sampler.name for sampler in legal if wanted is not None and sampler.scheduler == wanted.scheduler]:
        return kin[0]
    bare = {sampler.name.removeprefix("flow-"): sampler.name for sampler in legal}
    return bare[difflib.get_close_matches(name.removeprefix("flow-"), list(bare), n=1, cutoff=0.0)[0]]


def make_scheduler(name: str, config: Any) -> Any:
    """A fresh diffusers scheduler for one sample, from the model's own scheduler configuration."""
    import diffusers

    sampler, changes = SAMPLERS[name], {}
    if sampler.kind == "flow" and "shift" in config and "flow_shift" not in config:
        changes["flow_shift"] = config["shift"]  # one quantity that FlowMatchEuler and the solvers name differently
    return getattr(diffusers, sampler.scheduler).from_config(config, **sampler.overrides, **changes)
