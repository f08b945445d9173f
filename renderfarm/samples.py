"""A manifest row becomes samples: precedence row > job > model, seeds, and every check that needs no accelerator.

A row that cannot be rendered gives one error per image that it planned; nothing is rounded, clipped or guessed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from renderfarm import adapters, weighting
from renderfarm.arguments import ARGUMENTS
from renderfarm.config import Job, Render
from renderfarm.errors import InvalidInput, RenderfarmError
from renderfarm.manifest import EXTRA, ROW
from renderfarm.models.catalog import ModelInfo
from renderfarm.pictures import blank
from renderfarm.records import InputImage, RowError, Sample, SampleKey
from renderfarm.samplers import find_sampler
from renderfarm.seeds import MAX_SEED, sample_seed
from renderfarm.shown import without_secrets

MAX_PROMPT_CHARACTERS = 20_000
MAX_IMAGES_PER_ROW = 10_000
LCM_STEPS = 50  # original_inference_steps of diffusers' LCMScheduler


@dataclass(frozen=True)
class ExpandedRow:
    """A row's samples, or its errors; exactly one of the two is non-empty."""

    ordinal: int
    row_id: str
    samples: tuple[Sample, ...]
    errors: tuple[RowError, ...]


def expand_rows(rows: pa.Table, job: Job, model: ModelInfo) -> Iterator[ExpandedRow]:
    """One `ExpandedRow` per row of a streamed manifest table, in order."""
    arguments = [name for name in rows.column_names if not name.startswith(EXTRA)]
    columns = {name: _values(rows.column(name)) for name in arguments}
    unreadable = _unreadable_extras(rows)
    for index in range(len(rows)):
        cells = {name: column[index] for name, column in columns.items()}
        yield expand_row(cells | unreadable.get(index, {}), job, model)


def given_names(job: Job, model: ModelInfo, columns: Iterable[str]) -> set[str]:
    """What decides which columns an image table has: arguments that manifest or job give, and parts of the job."""
    parts = {"images": model.images, "after": job.after, "keep_originals": job.output.keep_originals}
    there = (name for name, given in parts.items() if given)
    return {*columns, *(name for name, value in job.render if value is not None), *model.companions, *there}


def _unreadable_extras(rows: pa.Table) -> dict[int, dict[str, Any]]:
    """Cells of the user's own columns that no reader of the output could decode, by row. Costs nothing where there are none."""
    found: dict[int, dict[str, Any]] = {}
    for name in filter(lambda name: name.startswith(EXTRA), rows.column_names):
        try:
            rows.column(name).validate(full=True)
        except pa.ArrowInvalid:
            for index, cell in enumerate(rows.column(name)):
                if isinstance(value := _value(cell), InvalidInput):
                    found.setdefault(index, {})[name] = value
    return found


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Python values; a cell that cannot be decoded becomes the exception that says why."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (UnicodeDecodeError, pa.ArrowException, ValueError):
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return InvalidInput(f"is not valid UTF-8 text (byte {error.start}); write the column again as UTF-8")
    except (pa.ArrowException, ValueError) as error:
        return InvalidInput(f"cannot be read: {error}")


def expand_row(values: dict[str, Any], job: Job, model: ModelInfo) -> ExpandedRow:
    """`values`: the row's cells by argument name, and its ordinal as `row`."""
    ordinal = int(values[ROW])
    prompt = values.get("prompt")
    row_id = str(ordinal) if values.get("id") is None or isinstance(values["id"], Exception) else str(values["id"])
    count = 1
    try:
        count = _images(values, job)
        samples = tuple(_samples(values, ordinal, row_id, count, job, model))
    except InvalidInput as error:
        errors = (row_error(SampleKey(ordinal, k), row_id, prompt, error) for k in range(count))
        return ExpandedRow(ordinal, row_id, (), tuple(errors))
    return ExpandedRow(ordinal, row_id, samples, ())


@dataclass(frozen=True)
class Usual:
    """What to measure with: a sample such as the manifest's rows ask for, and how many images a row gives."""

    sample: Sample
    images_per_row: float


def usual(rows: pa.Table, job: Job, model: ModelInfo) -> Usual:
    """From the manifest's first rows: of their samples, the one with the median amount of work."""
    good = [row.samples for row in expand_rows(rows, job, model) if row.samples]
    if not good:  # then whatever the model does by itself
        plain = job.model_copy(update={"render": Render(), "seed": 0})
        any_row = {ROW: 0, "prompt": "a picture", **dict.fromkeys(model.images, "any")}
        if "image" in model.images:
            any_row["strength"] = 1.0
        good = [expand_row(any_row, plain, model).samples]
    samples = sorted((samples[0] for samples in good), key=lambda s: s.height * s.width * s.num_inference_steps)
    return Usual(_with_any_image(samples[len(samples) // 2], model), sum(map(len, good)) / len(good))


def _with_any_image(sample: Sample, model: ModelInfo) -> Sample:
    """What an image shows does not matter for how long it takes; nothing is fetched for it."""
    if not model.images:
        return sample
    height, width = sample.height or model.height, sample.width or model.width
    image = blank(height, width)
    images: dict[str, Any] = dict.fromkeys(model.images, image)
    return replace(sample, height=height, width=width, **images)


def row_error(key: SampleKey, row_id: str, prompt: Any, error: RenderfarmError) -> RowError:
    digest = hashlib.sha256(prompt.encode()).hexdigest() if isinstance(prompt, str) else None
    return RowError(key, row_id, type(error).__name__, without_secrets(str(error)), error.retryable, digest)


def _images(values: dict[str, Any], job: Job) -> int:
    given = _integer(values, "num_images_per_prompt")
    count = given if given is not None else job.render.num_images_per_prompt or 1
    if not 1 <= count <= MAX_IMAGES_PER_ROW:
        raise InvalidInput(f"num_images_per_prompt is {count}; it must be between 1 and {MAX_IMAGES_PER_ROW:,}")
    return count


def _samples(values: dict[str, Any], ordinal: int, row_id: str, count: int, job: Job, model: ModelInfo) -> Iterator[Sample]:
    for name in values:
        value = _cell(values, name)  # also those that no sample needs: an id that cannot be read would move the seed
        if name in ARGUMENTS and name not in model.arguments and value not in (None, ""):
            raise InvalidInput(
                f"{name} is not an argument of {model.pipeline_class or model.name} in {model.task}{instead(name, model)}; leave it null, "
                f"or keep the column as a plain one: manifest: {{columns: {{{name}: null}}}}. Legal: {', '.join(sorted(model.arguments))}"
            )
    prompt = _prompt(values)
    negative = _text(values, "negative_prompt")
    height, width = _size(values, job, model)
    steps = _choose(_integer, values, "num_inference_steps", job, model.num_inference_steps)
    if steps < 1:
        raise InvalidInput(f"num_inference_steps is {steps}; it must be at least 1")
    guidance = _choose(_number, values, "guidance_scale", job, model.guidance_scale)
    if not 0 <= guidance <= 1000:
        raise InvalidInput(f"guidance_scale is {guidance}; it must be between 0 and 1000")
    sampler = find_sampler(_choose(_sampler, values, "sampler", job, model.sampler), model.kind, model.refused_samplers)
    if steps < sampler.min_steps:
        raise InvalidInput(f"num_inference_steps is {steps}; sampler {sampler.name} needs at least {sampler.min_steps}")
    if steps > sampler.max_steps:
        raise InvalidInput(f"num_inference_steps is {steps}; sampler {sampler.name} takes at most {sampler.max_steps}")
    images = _images_given(values, model)
    given_lora = _text(values, "adapters")
    lora = adapters.written(adapters.parse(given_lora if given_lora is not None else job.render.adapters, model.adapters))
    strength = _strength(values, steps, job, model)
    row_seed, blend = _seed(values, count, job), _blend(values, count)
    true_cfg = _number(values, "true_cfg_scale")
    if true_cfg is not None and not 0 <= true_cfg <= 1000:
        raise InvalidInput(f"true_cfg_scale is {true_cfg}; it must be between 0 and 1000")
    texts: dict[str, Any] = {name: _text(values, name) for name in ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")}
    if model.prompt_weighting is not None:
        _check_weights({"prompt": prompt, "negative_prompt": negative, **texts})
    for k in range(count):
        yield Sample(
            key=SampleKey(ordinal, k),
            row_id=row_id,
            prompt=prompt,
            negative_prompt=negative if negative is not None else job.render.negative_prompt,
            seed=sample_seed(job.seed_policy, job.seed, row_id, row_seed, k),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler.name,
            true_cfg_scale=true_cfg if true_cfg is not None else job.render.true_cfg_scale,
            seed_b=blend[0] + k if blend else None,
            blend=blend[1] if blend else None,
            adapters=lora,
            strength=strength,
            resize=job.inputs.resize if images else None,
            **texts,
            **images,
            **_control(values, job, model),
        )


def instead(name: str, model: ModelInfo) -> str:
    """What to give where the model does not take an argument, to go on with in a message."""
    guided = name == "guidance_scale" and "true_cfg_scale" in model.arguments
    return ", which is guided by true_cfg_scale and a negative_prompt: give those" if guided else ""


def _size(values: dict[str, Any], job: Job, model: ModelInfo) -> tuple[int, int]:
    """Height and width; 0 where the row's image is to say them."""
    sides = []
    for name in ("height", "width"):
        side = _choose(_integer, values, name, job, None if model.images else getattr(model, name))
        sides.append(0 if side is None else check_side(side, name, model))
    return sides[0], sides[1]


def _images_given(values: dict[str, Any], model: ModelInfo) -> dict[str, Any]:
    found = {}
    for name in model.images:
        value = _cell(values, name)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise InvalidInput(f"{name} is null; a job for {model.task} needs one in every row (other rows: another job)")
        found[name] = InputImage(None, value) if isinstance(value, bytes) else InputImage(value)
    return found


def _strength(values: dict[str, Any], steps: int, job: Job, model: ModelInfo) -> float | None:
    if "image" not in model.images:
        return None
    strength = _number(values, "strength")
    strength = strength if strength is not None else job.render.strength if job.render.strength is not None else model.strength
    assert strength is not None
    if not 0 < strength <= 1:
        raise InvalidInput(f"strength is {strength}; it must be above 0 and at most 1")
    if model.least_strength == "floor" and int(steps * strength) < 1:
        raise InvalidInput(f"strength {strength} of {steps} steps runs none of them; give at least {math.ceil(1000 / steps) / 1000}")
    if model.least_strength == "ceil" and steps - steps * strength == steps:  # as its call computes it
        raise InvalidInput(f"strength {strength} of {steps} steps runs none of them; give at least 0.001")
    if model.least_strength == "lcm" and int(LCM_STEPS * strength) < steps:
        raise InvalidInput(
            f"strength {strength} leaves {int(LCM_STEPS * strength)} of the {LCM_STEPS} steps that this model was distilled on, fewer than "
            f"num_inference_steps, {steps}; give fewer steps or a higher strength"
        )
    return strength


# what they are where neither row nor job says, and the call's own limits
SHARES = {"control_guidance_start": 0.0, "control_guidance_end": 1.0, "denoising_end": 0.8}


def _control(values: dict[str, Any], job: Job, model: ModelInfo) -> dict[str, Any]:
    """The numbers that a ControlNet and a refiner take."""
    found = {name: _choose(_number, values, name, job, default) for name, default in SHARES.items() if name in model.arguments}
    for name, share in found.items():
        if not 0 <= share <= 1:
            raise InvalidInput(f"{name} is {share}; it is a share of the whole, between 0 and 1")
    if found.get("denoising_end") in (0, 1):
        raise InvalidInput(f"denoising_end is {found['denoising_end']}; it must leave work to the model and to its refiner: 0.8 is usual")
    if "control_image" not in model.images:
        return found
    if found["control_guidance_start"] >= found["control_guidance_end"]:
        raise InvalidInput(
            f"control_guidance_start is {found['control_guidance_start']} and control_guidance_end {found['control_guidance_end']}; "
            "the start must come before the end"
        )
    scale = _choose(_number, values, "controlnet_conditioning_scale", job, 1.0)
    if not 0 <= scale <= 10:
        raise InvalidInput(f"controlnet_conditioning_scale is {scale}; it must be between 0 and 10")
    return found | {"controlnet_conditioning_scale": scale}


def _choose(read: Any, values: dict[str, Any], name: str, job: Job, default: Any) -> Any:
    """Row > job > model; an argument that the job overrides ignores the row's."""
    given = getattr(job.render, name)
    if name in job.render.override:
        return given
    value = read(values, name)
    return value if value is not None else given if given is not None else default


def _cell(values: dict[str, Any], name: str) -> Any:
    value = values.get(name)
    if isinstance(value, InvalidInput):
        raise InvalidInput(f"{name.removeprefix(EXTRA)} {value}")
    return value


def _text(values: dict[str, Any], name: str) -> str | None:
    value = _cell(values, name)
    if value is None:
        return None
    if "\x00" in value:
        raise InvalidInput(f"{name} holds a NUL character; remove it")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidInput(f"{name} has {len(value):,} characters; the limit is {MAX_PROMPT_CHARACTERS:,}: shorten it")
    return str(value)


def _prompt(values: dict[str, Any]) -> str:
    prompt = _text(values, "prompt")
    if prompt is None:
        raise InvalidInput("prompt is null; give the row a prompt or leave the row out")
    if not prompt.strip():
        raise InvalidInput("prompt is empty; give the row a prompt or leave the row out")
    return prompt


def _check_weights(texts: dict[str, str | None]) -> None:
    parts = {name: weighting.parse(text, name) for name, text in texts.items() if text is not None}
    if not weighting.words(parts["prompt"]).strip():
        raise InvalidInput("prompt has marks of weights, but no words; give the row a prompt or leave the row out")


def _number(values: dict[str, Any], name: str) -> float | None:
    value = _cell(values, name)
    if value is None:
        return None
    if not math.isfinite(value):
        raise InvalidInput(f"{name} is {value}; give a finite number")
    return float(value)


def _integer(values: dict[str, Any], name: str) -> int | None:
    """A whole number; floats from pandas are taken where they are whole, and a NaN there means a gap."""
    value = _cell(values, name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if value != value // 1 or math.isinf(value):
        raise InvalidInput(f"{name} is {value}; it must be a whole number")
    if isinstance(value, float) and abs(value) > 2**53:
        raise InvalidInput(f"{name} is {value:.0f} as a float, which is no longer exact; write the column as int64")
    return int(value)


def _seed(values: dict[str, Any], count: int, job: Job) -> int | None:
    """The row's own seed; the seeds of all its images must fit the table's int64."""
    seed, largest = _integer(values, "seed"), MAX_SEED - (count - 1)
    if seed is not None and not 0 <= seed <= largest:
        raise InvalidInput(f"seed is {seed}; it must be between 0 and 2^63 - {count} (leave it out for a derived one)")
    if seed is None and job.seed_policy == "same" and job.seed > largest:
        raise InvalidInput(f"the job's seed is {job.seed}; for {count} images it must be at most 2^63 - {count}")
    return seed


def _blend(values: dict[str, Any], count: int) -> tuple[int, float] | None:
    """`seed_b` and `blend`: the noise is that of `seed` at 0, that of `seed_b` at 1, and between them on the sphere."""
    seed_b, blend = _integer(values, "seed_b"), _number(values, "blend")
    if seed_b is None and blend is None:
        return None
    if seed_b is None or blend is None:
        raise InvalidInput("seed_b and blend go together; give both, or neither")
    if not 0 <= seed_b <= MAX_SEED - (count - 1):
        raise InvalidInput(f"seed_b is {seed_b}; it must be between 0 and 2^63 - {count}")
    if not 0 <= blend <= 1:
        raise InvalidInput(f"blend is {blend}; it must be between 0 (the noise of seed) and 1 (that of seed_b)")
    return seed_b, blend


def _sampler(values: dict[str, Any], name: str) -> str | int | None:
    value: str | int | None = _cell(values, name)
    return value


def check_side(value: int, name: str, model: ModelInfo) -> int:
    """The value, if the model can paint this height or width; else InvalidInput with the nearest that it can."""
    if value <= 0:
        raise InvalidInput(f"{name} is {value}; it must be a positive number of pixels")
    if value > model.max_side:
        raise InvalidInput(f"{name} is {value}; this model's limit is {model.max_side} pixels")
    if value % model.factor:
        below, above = value // model.factor * model.factor, -(-value // model.factor) * model.factor
        near = f"{below} or {above}" if below else f"{above}"
        raise InvalidInput(f"{name} is {value}; it must be a multiple of {model.factor} for this model: {near}")
    return value
