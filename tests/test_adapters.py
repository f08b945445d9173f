"""LoRA adapters by job and by row: the pixels of diffusers' own pipeline with the same adapters on."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from checker import check_complete, error_rows, image_rows
from covering import covering
from oracle import CLASSES, B, plain_pipeline, reference, row

import renderfarm
from renderfarm import adapters
from renderfarm.config import ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidInput, InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.models.catalog import describe
from renderfarm.models.load import load_model
from renderfarm.preparation import prepare
from renderfarm.slots import SlotLoop
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]
Adapters = Callable[[str], dict[str, str]]
SETS = (None, "one:1.0", "two:0.5", "one:0.25,two:-1.0", None, "one:1.0")


def make_adapter(kind: Any, folder: Path, file: Path, seed: int) -> Path:
    """Random low-rank layers for the attention of a pipeline's denoiser, and of its first text encoder in SD and SDXL."""
    pipe = kind.from_pretrained(folder)
    layers: dict[str, Any] = {}
    for part in ("unet", "transformer", *(("text_encoder",) if "Diffusion" in kind.__name__ and "3" not in kind.__name__ else ())):
        if (module := getattr(pipe, part, None)) is None:
            continue
        targets = ["q_proj", "v_proj"] if part == "text_encoder" else ["to_q", "to_v"]
        module.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        state = peft.get_peft_model_state_dict(module)
        layers[f"{part}_lora_layers"] = {key: torch.randn(value.shape, generator=generator) / 3 for key, value in state.items()}
    kind.save_lora_weights(file.parent, **layers, weight_name=file.name)
    return file


@pytest.fixture(scope="session")
def adapter_files(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def files(name: str) -> dict[str, str]:
        if name not in made:
            (root / name).mkdir()
            made[name] = {
                adapter: str(make_adapter(CLASSES[name], tiny_model(name), root / name / f"{adapter}.safetensors", seed))
                for seed, adapter in enumerate(("one", "two"))
            }
        return made[name]

    return files


COMPARED = ("sd", "lcm", "sdxl", "sd3", "flux-dev", "flux2-dev", "flux2-klein", "qwen-image", "z-image", "sana", "deepfloyd")


@pytest.mark.parametrize(("name", "dtype"), covering([(name, dtype) for name in COMPARED for dtype in ("float32", "bfloat16")]))
def test_rows_with_other_adapters_get_the_pixels_of_diffusers_with_them(
    name: str, dtype: str, tiny_model: Callable[[str], Path], adapter_files: Adapters
) -> None:
    folder, files = tiny_model(name), adapter_files(name)
    info = describe(ModelSpec(id=str(folder), adapters=files))
    usual: dict[str, Any] = {"sampler": info.sampler, "num_inference_steps": 2}
    rows = [row(k, **usual, adapters=on, guidance_scale=(3.0, 1.0)[k % 2]) for k, on in enumerate(SETS)]
    rows = [r if k != 4 else row(0, **usual, guidance_scale=3.0, adapters=None) for k, r in enumerate(rows)]
    loop = SlotLoop(lambda: load_model(info, Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        loop.ready.result(timeout=60)
        made = [future.result(timeout=300).pixels for future in loop.submit(rows)]
    finally:
        loop.close()
    bare = plain_pipeline(CLASSES[name], folder, dtype)
    pipe = plain_pipeline(CLASSES[name], folder, dtype)
    with warnings.catch_warnings(action="ignore"):  # peft finds it remarkable that there are two
        for adapter, file in files.items():
            pipe.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name, adapter_name=adapter)
    for wanted, ours in zip(rows, made, strict=True):
        if wanted.adapters is None:
            np.testing.assert_array_equal(ours, reference(bare, wanted))
            continue
        weights = dict(piece.split(":") for piece in wanted.adapters.split(","))
        pipe.set_adapters(list(weights), adapter_weights=[float(weight) for weight in weights.values()])
        np.testing.assert_array_equal(ours, reference(pipe, wanted), err_msg=str(wanted))
    assert (made[0] != made[5]).any()
    assert len({ours.tobytes() for ours in made}) == 5


def test_a_job_with_adapters_by_row_is_verified_from_the_output_alone(
    tiny_model: Callable[[str], Path],
    adapter_files: Adapters,
    write_manifest: Write,
    write_job: Write,
    tmp_path: Path,
) -> None:
    files = {name: shutil.copy(path, tmp_path / f"{name}.safetensors") for name, path in adapter_files("sd").items()}
    columns = {"prompt": ["a"] * 5, "seed": [1] * 5, "adapters": [None, "two, one:0.5", "none", "three", "one:x"]}
    model = {"id": str(tiny_model("sd")), "adapters": {"one": "one.safetensors", "two": "two.safetensors"}}
    path = write_job(write_manifest(columns), model=model, render={"adapters": "one", "sampler": "euler"}, workers={"batch_size": B})
    summary = renderfarm.run(path, engine="inline")
    assert (summary.images, summary.errors) == (3, 2)
    check_complete(tmp_path / "out", {(number, 0) for number in range(5)})
    made = image_rows(tmp_path / "out")
    assert [record["adapters"] for record in made] == ["one:1.0", "one:0.5,two:1.0", "none"]
    assert len({record["pixel_sha256"] for record in made}) == 3
    messages = [error["error_message"] for error in sorted(error_rows(tmp_path / "out"), key=lambda error: error["row"])]
    assert "'three' is not one of the job's model.adapters (one, two)" in messages[0]
    assert "'x' is not a weight" in messages[1]
    for file in files.values():
        Path(file).write_bytes(b"")  # another file now
    with pytest.raises(InvalidJob, match="damaged"):
        renderfarm.run(path, engine="inline")
    verified = verify(str(tmp_path / "out"), Choice(all=True), model=str(tiny_model("sd")))
    assert [again.result for again in verified.again] == ["identical"] * 3
    shutil.copy(adapter_files("sd")["two"], tmp_path / "one.safetensors")
    shutil.copy(adapter_files("sd")["two"], tmp_path / "two.safetensors")
    with pytest.raises(InvalidJob, match=r"model\.adapters"):
        renderfarm.run(path, engine="inline")


def test_files_that_are_no_adapters_are_refused_before_work_starts(
    tiny_model: Callable[[str], Path],
    adapter_files: Adapters,
    write_manifest: Write,
    write_job: Write,
    tmp_path: Path,
) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    for model, file, reason in (
        ("sd", "a.bin", "is no .safetensors file; other formats may hold code"),
        ("sd", "a.safetensors", "damaged, or no safetensors file"),
        ("sd", "gone.safetensors", "cannot be read: No such file or directory"),
        ("pixart-sigma", "a.safetensors", "takes no LoRA adapters"),
    ):
        job = load_job(write_job(write_manifest(), model={"id": str(tiny_model(model)), "adapters": {"a": file}}))
        with pytest.raises(InvalidJob, match=reason):
            renderfarm.run(job, engine="inline")
    with pytest.raises(InvalidJob, match="model builtin:fake: it takes no LoRA adapters"):
        prepare(load_job(write_job(write_manifest(), model={"id": "builtin:fake", "adapters": {"a": "a.safetensors"}})))
    job = load_job(write_job(write_manifest(), model={"id": str(tiny_model("sd"))}, render={"adapters": "a"}))
    with pytest.raises(InvalidJob, match=r"render: adapters: 'a' is not one of the job's model.adapters \(it has none\)"):
        prepare(job)
    other = {"a": adapter_files("flux-dev")["one"]}
    job = load_job(write_job(write_manifest(), model={"id": str(tiny_model("sd")), "adapters": other}))
    with pytest.raises(Fatal, match=r"model.adapters.a: .* (is no LoRA for|changes no layer of) StableDiffusionPipeline"):
        renderfarm.run(job, engine="inline")


def test_an_adapter_is_checked_against_the_jobs_hash_and_a_flipped_byte_stops_it_before_work(
    tiny_model: Callable[[str], Path], adapter_files: Adapters, write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    file = Path(shutil.copy(adapter_files("sd")["one"], tmp_path / "one.safetensors"))
    given = {"weights": "one.safetensors", "sha256": adapters.sha256(file.read_bytes())}
    render = {"adapters": "one", "height": 32, "width": 32}
    path = write_job(write_manifest(), model={"id": str(tiny_model("sd")), "adapters": {"one": given}}, render=render)
    prepared = prepare(load_job(path))
    assert prepared.frozen()["model"]["adapters"] == {"one": given["sha256"]}
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidJob, match=rf"model\.adapters\.one: .* has the hash .*, and the job asks for {given['sha256']}"):
        renderfarm.run(path, engine="inline")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Fatal, match=rf"model\.adapters\.one: .* here, and {given['sha256']} where the job was started"):
        load_model(prepared.model, prepared.job.workers)  # as on a node that has another file there
    file.unlink()
    with pytest.raises(Fatal, match=r"model\.adapters\.one: .* cannot be read on this node: No such file"):
        load_model(prepared.model, prepared.job.workers)
    with pytest.raises(InvalidJob, match=r"model\.adapters\.one.*sha256: String should match pattern"):
        load_job(write_job(write_manifest(), model={"id": str(tiny_model("sd")), "adapters": {"one": given | {"sha256": "ab"}}}))


@pytest.mark.parametrize("text", ["a:0.5,a", "b", "a:", "a:x", "a:nan", "a:11", ",", "a:1:2"])
def test_a_set_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^adapters: "):
        adapters.parse(text, ["a"])


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("", None), (" none ", None), ("b,a:0.50", "a:0.5,b:1.0"), ("a:0", None)])
def test_a_set_has_one_spelling(text: str | None, expected: str | None) -> None:
    assert adapters.written(adapters.parse(text, ["a", "b"])) == expected
