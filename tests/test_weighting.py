"""Weights and long texts: the pixels of diffusers' own pipeline given the embeddings that compel makes for its own users.

compel writes weights in another way, `(word)1.3`: what is compared here was written by hand in both.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from checker import check_complete, error_rows, image_rows
from compel import CompelForSD, CompelForSDXL
from covering import covering
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, REFERENCE, B, Model, pixels, plain_pipeline, row
from pictures_given import encoded, mask, picture
from test_adapters import make_adapter
from test_tasks import CLASSES

import renderfarm
from renderfarm.config import ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidInput, InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.models.catalog import ModelInfo, describe, for_task, with_weights
from renderfarm.models.families import FAMILIES
from renderfarm.models.load import load_model
from renderfarm.preparation import prepare
from renderfarm.records import InputImage, Sample
from renderfarm.slots import SlotLoop
from renderfarm.verification import Choice, verify
from renderfarm.weighting import MAX_WEIGHT, Fragment, parse, words

Write = Callable[..., Path]
FAMILIES_COMPARED = ["sd", "lcm", "sdxl", "sdxl-plain"]

# As our users write it: as compel's write it, and without any marks.
TEXTS = {
    "a red circle": ("a red circle", "a red circle"),
    "[(red:2) (blue:3)] star": ("(red)1.8181818181818181 (blue)2.727272727272727 star", "red blue star"),
    "a (red:1.3) circle": ("a (red)1.3 circle", "a red circle"),
    "a ((red)) circle on [white]": ("a (red)1.21 circle on (white)0.9090909090909091", "a red circle on white"),
    "(a (blue:0.5) star:1.2) in ( \\(rain\\) :1.5)": ("(a )1.2(blue)0.6( star)1.2 in (\\(rain\\))1.5", "a blue star in (rain)"),
    "astarandmorered, " * 12: ("astarandmorered, " * 12, "astarandmorered, " * 12),
    "a (red:1.4) star, a [green] one. " * 4: ("a (red)1.4 star, a (green)0.9090909090909091 one. " * 4, "a red star, a green one. " * 4),
    "a sky BREAK (stars:0.7) BREAK a moon, " + "andsoonandso, " * 7: (
        '("a sky", "(stars)0.7", "a moon, ' + "andsoonandso, " * 7 + '").and()',
        "a sky stars a moon, " + "andsoonandso, " * 7,
    ),
}
PROMPTS = list(TEXTS)


def compelled(pipe: Any, wanted: Sample, guided: bool) -> dict[str, torch.Tensor]:
    """B copies of the embeddings that compel's README has its users pass to the pipeline."""
    negative = None if not guided else wanted.negative_prompt
    if not hasattr(pipe, "tokenizer_2"):
        made = CompelForSD(pipe)(TEXTS[wanted.prompt][0], negative_prompt=TEXTS.get(negative or "", [""])[0] if guided else None)
        found = {"prompt_embeds": made.embeds, "negative_prompt_embeds": made.negative_embeds}
    else:
        if guided and negative is None and not pipe.config.force_zeros_for_empty_prompt:
            negative = ""
        pairs = [(wanted.prompt, wanted.prompt_2), (negative, None if negative is None else wanted.negative_prompt_2)]
        texts = [first if second is None else second for first, second in pairs]
        known = {**TEXTS, "": ("", ""), None: (None, None)}
        made, plain = (
            CompelForSDXL(pipe)(
                known[wanted.prompt][spelling],
                style_prompt=known[texts[0]][spelling],
                negative_prompt=known[negative][spelling],
                negative_style_prompt=known[texts[1]][spelling],
            )
            for spelling in (0, 1)
        )
        found = {"prompt_embeds": made.embeds, "negative_prompt_embeds": made.negative_embeds}
        # of compel's own pooled embedding the marks would be a part
        found |= {"pooled_prompt_embeds": plain.pooled_embeds, "negative_pooled_prompt_embeds": plain.negative_pooled_embeds}
    return {name: tensor.repeat(B, *[1] * (tensor.ndim - 1)) for name, tensor in found.items() if tensor is not None}


@dataclass
class WeightedModel(Model):
    @cached_property
    def info(self) -> ModelInfo:
        return with_weights(describe(ModelSpec(id=str(self.folder))), "a1111")

    def reference(self, wanted: Sample) -> np.ndarray:
        guided = wanted.guidance_scale > 1 and self.name != "lcm"
        return oracle.reference(self.pipe, wanted, embeddings=compelled(self.pipe, wanted, guided))


Models = Callable[..., WeightedModel]


@pytest.fixture(scope="module")
def weighted(tiny_model: Callable[[str], Path]) -> Iterator[Models]:
    made: dict[tuple[str, str], WeightedModel] = {}
    yield lambda name, dtype="float32": made.setdefault((name, dtype), WeightedModel(name, tiny_model(name), dtype))
    for one in made.values():
        one.close()


def mixed_rows(name: str) -> list[Sample]:
    """Every text, beside negatives of each length, guided and not."""
    rows = []
    for number in range(16):
        values: dict[str, Any] = {"prompt": PROMPTS[number % 8], "guidance_scale": (4.0, 1.0, 7.5)[number % 3], "num_inference_steps": 2}
        values["sampler"] = "lcm" if name == "lcm" else ("euler", "dpm++2m", "euler-a")[number % 3]
        if name != "lcm" and number % 4:
            values["negative_prompt"] = PROMPTS[(number * 3 + 1) % 8]
        if name.startswith("sdxl") and number % 3 == 2:
            values |= {"prompt_2": PROMPTS[(number + 4) % 8], "negative_prompt_2": PROMPTS[(number + 2) % 8]}
        rows.append(row(number, **values))
    return rows


@pytest.mark.parametrize(("name", "dtype"), covering([(name, dtype) for name in FAMILIES_COMPARED for dtype in DTYPES]))
def test_a_mixed_batch_gives_each_row_the_pixels_of_diffusers_with_compels_embeddings(name: str, dtype: str, weighted: Models) -> None:
    one, rows = weighted(name, dtype), mixed_rows(name)
    made = one.render(rows)
    for wanted, ours in zip(rows, made, strict=True):
        np.testing.assert_array_equal(ours, one.reference(wanted), err_msg=str(wanted))
    assert len({ours.tobytes() for ours in made}) == len(rows)


@pytest.mark.parametrize("name", FAMILIES_COMPARED)
def test_order_and_mates_move_no_pixel(name: str, weighted: Models) -> None:
    one, rows = weighted(name), mixed_rows(name)
    first = one.render(rows)
    for a, b in zip(first, one.render(rows[::-1])[::-1], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(first[::5], one.render(rows[::5]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_weight_of_one_is_no_weight_and_a_short_text_is_read_as_without_the_setting(name: str, weighted: Models) -> None:
    one = weighted(name)
    texts = ("a red star", "a (red:1.0) star", "(a red:1) star", "a (red:1.5) star", "a (red:0.5) star")
    usual, same, same_again, more, less = one.render([row(0, prompt=text, sampler="euler") for text in texts])
    np.testing.assert_array_equal(usual, oracle.reference(one.pipe, row(0, prompt="a red star", sampler="euler")))
    np.testing.assert_array_equal(same, usual)
    np.testing.assert_array_equal(same_again, usual)
    assert len({picture.tobytes() for picture in (usual, more, less)}) == 3


def test_a_word_of_little_weight_leaves_the_picture() -> None:
    info = with_weights(describe(ModelSpec(id="builtin:shapes")), "a1111")
    loop = SlotLoop(lambda: load_model(info, Workers(batch_size=4)))
    usual: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 12, "guidance_scale": 5.0, "sampler": "dpm++2m"}
    texts = (f"a large (red:{weight}) circle in the centre on a white background" for weight in (1, 1.3, 0.1))
    rows = [row(seed, prompt=text, **usual) for text in texts for seed in range(4)]
    try:
        made = pixels(loop.submit(rows))
    finally:
        loop.close()
    middles = np.array([picture[24:40, 24:40].reshape(-1, 3).mean(0) for picture in made]).reshape(3, 4, 3)
    red = (middles[..., 0] > 150) & (middles[..., 1:] < 90).all(-1)
    assert red[:2].all()
    assert red[2].sum() <= 1


def test_without_the_setting_brackets_are_words(model: Callable[..., Model]) -> None:
    one, wanted = model("sd"), row(0, prompt="a (red:1.3) circle", sampler="euler")
    np.testing.assert_array_equal(one.render([wanted])[0], one.reference(wanted))
    assert "prompt_weighting" not in one.adapter.profile()


def test_every_token_of_every_chunk_counts(weighted: Models) -> None:
    adapter = weighted("sd").adapter
    # the tiny tokenizer has a token for each letter
    for prompt, letters, chunks in (
        ("a (red:1.3) circle", 10, 1),
        ("ab BREAK cd", 4, 2),
        ("astarandmorered, " * 12, 16 * 12, 3),
        ("()", 0, 1),
    ):
        counted = adapter.count_tokens(row(0, prompt=prompt, negative_prompt="x" * 500, sampler="euler"))
        assert (counted.tokens, counted.cut_off, counted.negative_cut_off) == (letters + 2 * chunks, None, None)
    short, long, long_negative = (
        adapter.slot_group(row(0, prompt=prompt, negative_prompt=negative, sampler="euler"))
        for prompt, negative in (("a", None), ("a" * 100, None), ("a", "x" * 100))
    )
    assert short != long == long_negative


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_the_text_encoder_reach_weighted_and_padded_texts(
    dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("sd")
    files = {f"l{seed}": str(make_adapter(oracle.CLASSES["sd"], folder, tmp_path / f"l{seed}.safetensors", seed)) for seed in (0, 1)}
    info = with_weights(describe(ModelSpec(id=str(folder), adapters=files)), "a1111")
    texts = [(PROMPTS[2], PROMPTS[5]), (PROMPTS[6], None)]
    rows = [
        row(k, prompt=prompt, negative_prompt=negative, adapters=on, sampler="euler", num_inference_steps=2)
        for k, (prompt, negative, on) in enumerate((*texts_of, on) for on in (None, "l0:1.0", "l1:0.5", None) for texts_of in texts)
    ]
    loop = SlotLoop(lambda: load_model(info, Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        made = pixels(loop.submit(rows))
    finally:
        loop.close()
    bare, changed = (plain_pipeline(oracle.CLASSES["sd"], folder, dtype) for _ in range(2))
    with warnings.catch_warnings(action="ignore"):  # peft finds it remarkable that there are two
        for name, file in files.items():
            changed.load_lora_weights(tmp_path, weight_name=Path(file).name, adapter_name=name)
    for wanted, ours in zip(rows, made, strict=True):
        pipe = bare
        if wanted.adapters is not None:
            name, weight = wanted.adapters.split(":")
            pipe = changed
            pipe.set_adapters([name], adapter_weights=[float(weight)])
        np.testing.assert_array_equal(ours, oracle.reference(pipe, wanted, embeddings=compelled(pipe, wanted, True)), err_msg=str(wanted))


@pytest.mark.parametrize(
    ("name", "task", "dtype"), covering([(*pair, dtype) for pair in CLASSES if pair[0] in FAMILIES_COMPARED for dtype in DTYPES])
)
def test_images_to_begin_with_and_weighted_texts(name: str, task: str, dtype: str, tiny_model: Callable[[str], Path]) -> None:
    folder, inpaint = tiny_model(name), task == "inpainting"
    info = for_task(with_weights(describe(ModelSpec(id=str(folder))), "a1111"), ("image", "mask_image") if inpaint else ("image",))
    images = {"image": picture(), **({"mask_image": mask()} if inpaint else {})}
    given_images = {kind: InputImage(None, encoded(image)) for kind, image in images.items()}
    rows = [
        replace(wanted, sampler="lcm" if name == "lcm" else "euler", num_inference_steps=4, strength=0.5, **given_images)
        for wanted in mixed_rows(name)[:8]
    ]
    loop = SlotLoop(lambda: load_model(info, Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        made = pixels(loop.submit(rows))
    finally:
        loop.close()
    pipe = plain_pipeline(CLASSES[name, task], folder, dtype, **({} if name == "sdxl" else {"safety_checker": None}))
    pipe.scheduler = REFERENCE[rows[0].sampler][0].from_config(pipe.original_config)
    for wanted, ours in zip(rows, made, strict=True):
        expected = pipe(
            **compelled(pipe, wanted, wanted.guidance_scale > 1 and name != "lcm"),
            **{kind: [image] * B for kind, image in images.items()},
            **({"height": 32, "width": 32} if inpaint else {}),
            strength=0.5,
            guidance_scale=wanted.guidance_scale,
            num_inference_steps=4,
            generator=[torch.Generator("cpu").manual_seed(wanted.seed) for _ in range(B)],
        ).images[0]
        np.testing.assert_array_equal(ours, np.asarray(expected), err_msg=str(wanted))
    assert len({ours.tobytes() for ours in made}) == len(rows)


BAD = {
    "a (red:11) star": "prompt: 'red' has the weight 11; it must be between 0 and 10",
    "a (red:-1) star": "prompt: 'red' has the weight -1; it must be between 0 and 10",
    "(a:" + "9" * 400 + ")": "prompt: 'a' has the weight inf",
    "((" + "(red)" * 2 + ":9):2)": "prompt: 'redred' has the weight 19.8; it must be between 0 and 10 (nested weights multiply)",
    "(" * 101 + "a": r"prompt: more than 100 brackets are open; close them, or write \( for the bracket itself",
    "[cat:dog:0.5]": "prompt: […:number] and […|…] change the text between steps, which is not done here",
    "a [cat|dog]": "prompt: […:number] and […|…] change the text between steps",
    "a cat <lora:detail:0.8>": "prompt: <lora:detail:0.8> names a network, which is not read here; LoRA adapters go into the column",
    "a cat AND a dog": "prompt: AND joins prompts that are painted apart, which is not done here; write it small",
    "([])": "prompt has marks of weights, but no words",
}


def test_a_job_with_weights_and_errors_is_verified_from_the_output_alone(
    tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    prompts = [*PROMPTS, *BAD, "a star"]
    negatives = [*PROMPTS[::-1], *[None] * len(BAD), "(ugly:99)"]
    manifest = write_manifest({"prompt": prompts, "negative_prompt": negatives, "seed": list(range(len(prompts)))})
    usual = {
        "render": {"prompt_weighting": "a1111", "on_truncation": "error"},
        "model": str(tiny_model("sd")),
        "workers": {"batch_size": B},
    }
    path = write_job(manifest, **usual)
    summary = renderfarm.run(path, engine="inline")
    assert (summary.images, summary.errors) == (len(PROMPTS), len(BAD) + 1)
    check_complete(tmp_path / "out", {(number, 0) for number in range(len(prompts))})
    made = image_rows(tmp_path / "out")
    assert [record["prompt"] for record in made] == PROMPTS
    assert [record["prompt_truncated"] for record in made] == [False] * len(PROMPTS)
    assert made[5]["prompt_tokens"] == 16 * 12 + 2 * 3
    errors = sorted(error_rows(tmp_path / "out"), key=lambda error: error["row"])
    assert {error["error_class"] for error in errors} == {"InvalidInput"}
    for error, reason in zip(errors, [*BAD.values(), "negative_prompt: 'ugly' has the weight 99"], strict=True):
        assert reason in error["error_message"]
    assert "| prompts | with weights, as users of A1111" in (tmp_path / "out/README.md").read_text()
    verified = verify(str(tmp_path / "out"), Choice(all=True), model=str(tiny_model("sd")))
    assert [again.result for again in verified.again] == ["identical"] * len(PROMPTS)
    other = write_job(manifest, **usual | {"render": {"on_truncation": "error"}})
    with pytest.raises(InvalidJob, match=r'render\.prompt_weighting: "a1111" there, null now'):
        renderfarm.run(other, engine="inline")


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "pixart-sigma", "builtin:fake"])
def test_other_families_refuse_the_setting(name: str, tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write) -> None:
    model = name if ":" in name else str(tiny_model(name))
    job = load_job(write_job(write_manifest(), model=model, render={"prompt_weighting": "a1111"}))
    having = "StableDiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionXLPipeline"
    with pytest.raises(InvalidJob, match=f"render.prompt_weighting is for {having}; leave it out, or choose another model"):
        prepare(job)
    assert {n for n, family in FAMILIES.items() if family.prompt_weighting} == {oracle.CLASSES[n].__name__ for n in FAMILIES_COMPARED}


def test_a_negative_prompt_of_the_job_is_checked_before_work_starts(write_manifest: Write, write_job: Write) -> None:
    render = {"prompt_weighting": "a1111", "negative_prompt": "(ugly:12)"}
    job = load_job(write_job(write_manifest(), model="builtin:shapes", render=render))
    with pytest.raises(InvalidJob, match="render: negative_prompt: 'ugly' has the weight 12"):
        prepare(job)


def test_a_worker_without_compel_says_how_to_install_it(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "compel" else find(name, *more))
    info = with_weights(describe(ModelSpec(id=str(tiny_model("sd")))), "a1111")
    with pytest.raises(Fatal, match=r"needs the package compel: pip install 'renderfarm\[weights\]'"):
        load_model(info, Workers(batch_size=B))


# The grammar.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(never closed", [("never closed", 1.1)]),
        ("[never closed", [("never closed", 1 / 1.1)]),
        ("never opened) [a]", [("never opened) ", 1), ("a", 1 / 1.1)]),
        ("opened [b:1.3) c]", [("opened ", 1), ("b:1.3) c", 1 / 1.1)]),
        (r"\(literal\] \\(a)", [("(literal] \\", 1), ("a", 1.1)]),
        (r"C:\dir \ ", [(r"C:\dir \ ", 1)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        ("(a:b:1.5) (c:x) (d:1.2.3) (e: .5 ) (f:+2)",
         [("a:b", 1.5), (" ", 1), ("c:x", 1.1), (" ", 1), ("d:1.2.3", 1.1), (" ", 1), ("e", 0.5), (" ", 1), ("f", 2)]),
        ("((a:1.3) b)", [("a", 1.3 * 1.1), (" b", 1.1)]),
        ("([on] off)", [("on", 1), (" off", 1.1)]),
        ("", []),
        ("(a:0)", [("a", 0)]),
    ],
)  # fmt: skip
def test_what_is_written_is_what_is_weighed(text: str, expected: list[tuple[str, float]]) -> None:
    (part,) = parse(text)
    assert [fragment.text for fragment in part] == [text for text, _ in expected]
    assert [fragment.weight for fragment in part] == pytest.approx([weight for _, weight in expected])


def test_break_starts_another_part_inside_brackets_too_but_not_inside_words() -> None:
    assert [words((part,)) for part in parse("a BREAK b BREAKER breakBREAK BREAK")] == ["a ", " b BREAKER breakBREAK ", ""]
    assert parse("(a BREAK b:2)") == ((Fragment("a ", 2.0),), (Fragment(" b", 2.0),))


LITERAL = st.text(st.characters(codec="utf-8", exclude_characters="<")).filter(lambda text: not re.search(r"\b(AND|BREAK)\b", text))
FRAGMENTS = st.lists(st.tuples(LITERAL.filter(bool), st.floats(0, MAX_WEIGHT).map(lambda weight: round(weight, 3))), min_size=1, max_size=6)


def escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)


@given(st.lists(FRAGMENTS, min_size=1, max_size=3))
def test_fragments_that_are_written_down_are_read_again(parts: list[list[tuple[str, float]]]) -> None:
    written = " BREAK ".join("".join(f"({escaped(text)}:{weight:.3f})" for text, weight in part) for part in parts)
    found = parse(written)
    assert words(found) == " ".join(
        " " * (k > 0) + "".join(text for text, _ in part) + " " * (k < len(parts) - 1) for k, part in enumerate(parts)
    )
    for part, expected in zip(found, parts, strict=True):
        letters = [(letter, fragment.weight) for fragment in part for letter in fragment.text]
        wanted = [(letter, weight) for text, weight in expected for letter in text]
        assert [pair for pair in letters if pair[0] != " "] == [pair for pair in wanted if pair[0] != " "]
        assert all(a.weight != b.weight for a, b in itertools.pairwise(part))


@given(LITERAL)
def test_what_is_escaped_is_text(text: str) -> None:
    assert parse(escaped(text)) == (((Fragment(text, 1.0),) if text else ()),)


@given(st.text("ab ()[]:.15\\|", max_size=60))
def test_nothing_but_marks_is_lost(text: str) -> None:
    try:
        found = parse(text)
    except InvalidInput:
        return
    kept = [letter for letter in words(found) if letter in "ab"]
    assert kept == [letter for letter in text if letter in "ab"]
    assert all(0 <= fragment.weight <= MAX_WEIGHT and fragment.text for part in found for fragment in part)
    remaining = iter(text)
    assert all(letter in remaining for letter in words(found))  # in the same order


def test_weights_with_an_encoder_that_is_nowhere_are_refused(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renderfarm.models.loaded.prepare_torch", lambda workers: "cuda")  # which a machine without one refuses first
    info = with_weights(describe(ModelSpec(id=str(tiny_model("sd")))), "a1111")
    with pytest.raises(Fatal, match="do not go together; use offload: model"):
        load_model(info, Workers(batch_size=B, offload="sequential"))
