"""The sampler table: the names people use, and the diffusers scheduler behind each.

One line per sampler. Its options are applied on top of the model's own scheduler configuration, as
`Scheduler.from_config(pipe.scheduler.config, **options)` does. Importing this module imports no torch;
`make_scheduler` does.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from renderfarm.errors import InvalidInput

Kind = Literal["diffusion", "flow", "own"]
# the default of each class that has a choice
_ALGORITHMS = {
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "DPMSolverSinglestepScheduler": "dpmsolver++",
    "DEISMultistepScheduler": "deis",
}
_SECOND_ORDER = {"solver_order": 2}  # the default, and the 2 of 2M and 2S
_SOLVERS = (*_ALGORITHMS, "UniPCMultistepScheduler")
# Of the classes below, those that take `rescale_betas_zero_snr`; the others would leave it out and start from other noise.
_ZERO_SNR = (
    *("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
)


@dataclass(frozen=True)
class Sampler:
    """`overrides`: what the name says of its scheduler.

    `draws`: takes fresh noise at its steps, from the sample's own generator (ancestral and SDE kinds).

    `kind`: what the model must have been trained for, diffusion (noise or v at a timestep) or flow (a velocity at a time
    between picture and noise). The other kind's samplers run, too, and paint nonsense. own: nobody knows what the model
    was trained for, and its own scheduler is the only one.

    `a1111`: how A1111's web UI spells it, without the schedule; None where it has no such sampler.
    """

    name: str
    scheduler: str
    overrides: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    draws: bool = False
    min_steps: int = 1
    max_steps: int = 998  # of 1000 training steps; at 999 and 1000 half of the schedulers fail or give NaN
    kind: Kind = "diffusion"
    a1111: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the name means under every model: `overrides`, and the class's defaults for what it says nothing of."""
        # before flow's noise levels, the solvers take any of the others
        others = {"use_exponential_sigmas": False, "use_beta_sigmas": False} if self.kind == "flow" else {}
        return {"use_karras_sigmas": False, **others, **self._of_class, **self.overrides}

    def means(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration of this class says the same; of what order its solver is, no line tells apart."""
        said = self.options.items() - _SECOND_ORDER.items()
        return all(config.get(option, self._of_class.get(option, False)) == value for option, value in said)

    @property
    def _of_class(self) -> dict[str, Any]:
        algorithm = {"algorithm_type": _ALGORITHMS[self.scheduler]} if self.scheduler in _ALGORITHMS else {}
        return algorithm | (_SECOND_ORDER if self.scheduler in _SOLVERS else {})


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_FLOW_DPM = {**_FLOW, "algorithm_type": "dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}  # instead of the model's own
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_TABLE = (
    Sampler("ddpm", "DDPMScheduler", draws=True),
    Sampler("ddim", "DDIMScheduler", a1111="DDIM"),
    Sampler("pndm", "PNDMScheduler", {"skip_prk_steps": True}, ("plms", "k_plms"), a1111="PLMS"),
    Sampler("dpm", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, ("dpm-solver",)),
    Sampler("dpm++2m", "DPMSolverMultistepScheduler", aliases=("dpmpp_2m", "dpmsolver++"), a1111="DPM++ 2M"),
    Sampler("dpm++2m-karras", "DPMSolverMultistepScheduler", _KARRAS, ("dpmpp_2m_karras",), a1111="DPM++ 2M"),
    Sampler("dpm++2m-sde", "DPMSolverMultistepScheduler", _SDE, ("dpmpp_2m_sde",), draws=True, a1111="DPM++ 2M SDE"),
    Sampler(
        *("dpm++2m-sde-karras", "DPMSolverMultistepScheduler", {**_SDE, **_KARRAS}, ("dpmpp_2m_sde_karras",)),
        draws=True, a1111="DPM++ 2M SDE",
    ),
    Sampler("dpm++2s", "DPMSolverSinglestepScheduler", aliases=("dpmpp_2s", "dpm++singlestep"), min_steps=2),
    Sampler("dpm++sde", "DPMSolverSinglestepScheduler", _SDE, ("dpmpp_sde",), draws=True, min_steps=2, a1111="DPM++ SDE"),
    Sampler(
        *("dpm++sde-karras", "DPMSolverSinglestepScheduler", {**_SDE, **_KARRAS}, ("dpmpp_sde_karras",)),
        draws=True, min_steps=2, a1111="DPM++ SDE",
    ),
    Sampler("euler", "EulerDiscreteScheduler", aliases=("k_euler",), a1111="Euler"),
    Sampler("euler-karras", "EulerDiscreteScheduler", _KARRAS, a1111="Euler"),
    Sampler("euler-a", "EulerAncestralDiscreteScheduler", aliases=("k_euler_a", "k_euler_ancestral", "euler_ancestral"),
            draws=True, a1111="Euler a"),
    Sampler("heun", "HeunDiscreteScheduler", aliases=("k_heun",), a1111="Heun"),
    Sampler("heun-karras", "HeunDiscreteScheduler", _KARRAS, a1111="Heun"),
    Sampler("dpm2", "KDPM2DiscreteScheduler", aliases=("k_dpm_2",), a1111="DPM2"),
    Sampler("dpm2-karras", "KDPM2DiscreteScheduler", _KARRAS, a1111="DPM2"),
    Sampler("dpm2-a", "KDPM2AncestralDiscreteScheduler", aliases=("k_dpm_2_a", "k_dpm_2_ancestral", "dpm_2_ancestral"),
            draws=True, a1111="DPM2 a"),
    Sampler("dpm2-a-karras", "KDPM2AncestralDiscreteScheduler", _KARRAS, draws=True, a1111="DPM2 a"),
    Sampler("lms", "LMSDiscreteScheduler", aliases=("k_lms",), a1111="LMS"),
    Sampler("lms-karras", "LMSDiscreteScheduler", _KARRAS, a1111="LMS"),
    Sampler("unipc", "UniPCMultistepScheduler", a1111="UniPC"),
    Sampler("deis", "DEISMultistepScheduler"),
    # distilled models' samplers draw their steps from the 50 that they were distilled on
    Sampler("lcm", "LCMScheduler", draws=True, max_steps=50, a1111="LCM"),
    Sampler("tcd", "TCDScheduler", draws=True, max_steps=50),
    Sampler("flow-euler", "FlowMatchEulerDiscreteScheduler", aliases=("flowmatch_euler", "fm_euler"), kind="flow"),
    Sampler("flow-dpm++2m", "DPMSolverMultistepScheduler", _FLOW_DPM, ("flow_dpmpp_2m",), kind="flow"),
    Sampler("flow-unipc", "UniPCMultistepScheduler", _FLOW, kind="flow"),
    Sampler("default", "the model's own", draws=True, kind="own"),
)  # fmt: skip
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _TABLE}

# What a model was trained for, by its scheduler's class, where no line says it. Of other classes nothing is known.
_OTHER_CLASSES = {
    **dict.fromkeys(("SASolverScheduler", "DPMSolverSDEScheduler", "IPNDMScheduler"), "diffusion"),
    **dict.fromkeys(("DDIMParallelScheduler", "DDPMParallelScheduler", "DDIMInverseScheduler"), "diffusion"),
    **dict.fromkeys(("LTXEulerAncestralRFScheduler", "HeliosScheduler", "HeliosDMDScheduler", "PiflowScheduler"), "flow"),
    **dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"), "EDM"),
    **dict.fromkeys(("CMStochasticIterativeScheduler", "KarrasVeScheduler"), "EDM"),
    "SCMScheduler": "TrigFlow",
}

# Samplers that are known elsewhere and refused here, by each of their usual names: why, and which one is nearest.
GLOBAL_STATE = "draws its noise from the process's global random state, so its pixels would depend on batch mates and order"
NOT_COMPARED = "was not compared with diffusers' own pipeline here"
EDM = "is for EDM models, which take their noise levels otherwise"
NOT_THERE = "is not in diffusers, or not with the steps that its name promises elsewhere, so its pixels would be another sampler's"
REFUSED: dict[str, tuple[str, str]] = {
    "sasolver": (NOT_COMPARED, "dpm++2m-sde"),
    "ipndm": (NOT_COMPARED, "pndm"),
    "dpm++ 2m sde heun": (NOT_COMPARED, "dpm++2m-sde"),
    "dpm++ 2m sde heun karras": (NOT_COMPARED, "dpm++2m-sde-karras"),
    "dpm++ 2s a": (NOT_THERE, "dpm++2s"),
    "dpm++ 2s a karras": (NOT_THERE, "dpm++2s"),
    "dpm++ 3m sde": (NOT_THERE, "dpm++2m-sde"),
    "dpm++ 3m sde karras": (NOT_THERE, "dpm++2m-sde-karras"),
    "dpm fast": (NOT_THERE, "dpm"),
    "dpm adaptive": (NOT_THERE, "dpm"),
    "dpm ad": (NOT_THERE, "dpm"),
    "restart": (NOT_THERE, "heun"),
    "dpmsolversde": (GLOBAL_STATE, "dpm++sde"),
    "edm euler": (EDM, "euler"),
    "edm dpm solver multistep": (EDM, "dpm++2m"),
    **dict.fromkeys(("flow-heun", "flow match heun discrete"), ("fails in diffusers for every flow model tried", "flow-euler")),
    **dict.fromkeys(("flow-lcm", "flow match lcm"), (GLOBAL_STATE, "flow-euler")),
}
_SCHEDULES = ("polyexponential", "exponential", "exp", "karras", "beta", "sgmuniform")  # written behind a sampler's name

# DiffusionDB's column `sampler`: https://huggingface.co/datasets/poloclub/diffusiondb, "Data Fields"
DIFFUSIONDB_CODES = {1: "ddim", 2: "pndm", 3: "euler", 4: "euler-a", 5: "heun", 6: "dpm2", 7: "dpm2-a", 8: "lms"}


_K_DIFFUSION = re.compile(r"(?:k|sample)((?:dpm\+\+|dpm2|dpmfast|dpmad|euler|heun|lms).*?)(ka)?")


def _spelling(name: str) -> str:
    """`DPM++ 2M Karras`, `dpmpp_2m_karras`, `k_dpmpp_2m_ka` and `dpm++2m-karras` are one name."""
    spelled = re.sub(r"[\s_\-]+", "", name.lower()).replace("dpmpp", "dpm++").replace("ancestral", "a").removesuffix("scheduler")
    if its := _K_DIFFUSION.fullmatch(spelled):
        return its[1] + ("karras" if its[2] else "")
    return spelled


NOTHING: Mapping[str, str] = {}
_BY_SPELLING = {_spelling(word): sampler for sampler in _TABLE for word in (sampler.name, *sampler.aliases)}
_REFUSED_BY_SPELLING = {_spelling(word): reason for word, reason in REFUSED.items()}


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
    if found := _BY_SPELLING.get(_spelling(name)) or _by_class(_spelling(name), kind):
        return _legal(found, kind, refused)
    if inexact := _inexact(_spelling(name)):
        raise InvalidInput(f"sampler {name!r} {inexact[0]}; {_instead(inexact[1], kind, refused)}")
    legal = [spelling for spelling, sampler in _BY_SPELLING.items() if sampler.kind == kind and sampler.name not in refused]
    close = difflib.get_close_matches(_spelling(name), legal, n=1, cutoff=0.4)
    hint = f"; did you mean {_BY_SPELLING[close[0]].name!r}?" if close else ""
    raise InvalidInput(f"unknown sampler {name!r}{hint} (`renderfarm samplers` lists them)")


def _by_class(spelled: str, kind: Kind) -> Sampler | None:
    """The plain line of a class of diffusers, of that kind if there is one."""
    lines = [sampler for sampler in _TABLE if _spelling(sampler.scheduler) == spelled]
    return min(lines, key=lambda sampler: (sampler.kind != kind, len(sampler.overrides)), default=None)


def _inexact(spelled: str) -> tuple[str, str] | None:
    """Why a sampler that is known elsewhere is refused, and which one is nearest."""
    if spelled in _REFUSED_BY_SPELLING:
        return _REFUSED_BY_SPELLING[spelled]
    for schedule in _SCHEDULES:
        bare = spelled.removesuffix(schedule)
        if bare != spelled and bare in _BY_SPELLING:
            return f"has noise levels ({schedule}) that were not compared with it here", _BY_SPELLING[bare].name
        if bare in _REFUSED_BY_SPELLING:
            return _REFUSED_BY_SPELLING[bare]
    return None


def _legal(sampler: Sampler, kind: Kind, refused: Mapping[str, str]) -> Sampler:
    if kind != sampler.kind and "own" in (kind, sampler.kind):
        reason = (
            "was not compared for this class of model, which renders with its own scheduler"
            if kind == "own"
            else "is for classes of models that are not in the table of families"
        )
        raise InvalidInput(f"sampler {sampler.name} {reason}; leave sampler out, or {_instead('euler', kind, refused)}")
    if sampler.kind != kind:
        raise InvalidInput(
            f"sampler {sampler.name} is for {sampler.kind} models, and this is a {kind} model: it would paint nonsense; "
            + _instead(sampler.name, kind, refused)
        )
    if sampler.name in refused:
        raise InvalidInput(
            f"sampler {sampler.name} cannot render this model: {refused[sampler.name]}; {_instead(sampler.name, kind, refused)}"
        )
    return sampler


def why_not(sampler: Sampler, kind: Kind, refused: Mapping[str, str] = NOTHING) -> str | None:
    """Why a model of that kind cannot use the sampler; None where it can."""
    try:
        _legal(sampler, kind, refused)
    except InvalidInput as error:
        return str(error)
    return None


def _instead(name: str, kind: Kind, refused: Mapping[str, str]) -> str:
    """The legal sampler of that name for the model's kind; else of the most similar one, of its scheduler class if there is one."""
    wanted = SAMPLERS[name]
    legal = {sampler.name.removeprefix("flow-"): sampler for sampler in _TABLE if sampler.kind == kind and sampler.name not in refused}
    kin = [bare for bare, sampler in legal.items() if sampler.scheduler == wanted.scheduler]
    near = difflib.get_close_matches(name.removeprefix("flow-"), kin or list(legal), n=1, cutoff=0.0)
    return f"use {legal[near[0]].name!r}" if near else "no other one can render it either"


def trained_for(scheduler: str, config: Mapping[str, Any]) -> str | None:
    """What a model with a scheduler of that class and configuration was trained for: a `Kind`, EDM or TrigFlow; None: not known."""
    if scheduler in _OTHER_CLASSES and _OTHER_CLASSES[scheduler] != "diffusion":
        return _OTHER_CLASSES[scheduler]
    if scheduler.startswith("Flow") or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    return "diffusion" if scheduler in _OTHER_CLASSES or any(sampler.scheduler == scheduler for sampler in _TABLE) else None


def own_sampler(scheduler: str, config: Mapping[str, Any], kind: Kind) -> Sampler | None:
    """The line that means what a model's own scheduler does; the plain one of its class where none does exactly."""
    lines = [sampler for sampler in _TABLE if sampler.scheduler == scheduler and sampler.kind == kind]
    plain = min(lines, key=lambda sampler: len(sampler.overrides), default=None)
    return next((sampler for sampler in lines if sampler.means(config)), plain)


def without_zero_snr() -> list[str]:
    """Names of the samplers whose class knows of no noise that hides the picture wholly."""
    return [sampler.name for sampler in _TABLE if sampler.kind == "diffusion" and sampler.scheduler not in _ZERO_SNR]


def copied(scheduler: Any) -> Any:
    """Another scheduler in the same state, of which nothing that may change is shared; its configuration cannot."""
    other = copy.copy(scheduler)
    vars(other).update({name: copy.deepcopy(value) for name, value in vars(scheduler).items() if name != "_internal_dict"})
    return other


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler for one sample, from the model's own scheduler configuration."""
    import diffusers

    sampler = SAMPLERS[name]
    # the model's own scheduler keeps what no line says, such as exponential noise levels; under another name it is that one
    own = own_sampler(config.get("_class_name") or sampler.scheduler, config, sampler.kind)
    options = dict(sampler.overrides if sampler is own else sampler.options)
    if sampler.kind == "flow" and "shift" in config and "flow_shift" not in config:
        options["flow_shift"] = config["shift"]  # one quantity that FlowMatchEuler and the solvers name differently
    return getattr(diffusers, sampler.scheduler).from_config(config, **options)
