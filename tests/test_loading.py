"""Models given in parts: variants of weights, components from elsewhere; and models that are refused before anything of them is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import families
import gguf
import numpy as np
import pytest
import torch
import torchao
import transformers
from oracle import CLASSES, B, plain_pipeline, reference, row
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig, PerRow, PerTensor

import renderfarm
from renderfarm.cli.outputs import _model_and_parts
from renderfarm.config import ComponentSpec, ModelSpec, Workers
from renderfarm.errors import Fatal, InvalidJob, ProfileMismatch
from renderfarm.jobfile import load_job, model_spec
from renderfarm.models.about import about
from renderfarm.models.catalog import describe
from renderfarm.models.fingerprint import weight_hashes
from renderfarm.models.load import load_model
from renderfarm.models.measure import check_places
from renderfarm.models.quantization import load_arguments
from renderfarm.preparation import prepare
from renderfarm.slots import SlotLoop
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]
USUAL: dict[str, Any] = {"sampler": "euler", "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the test's own, not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def own(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model that a test may change."""
    return lambda name, into=None: Path(shutil.copytree(tiny_model(name), tmp_path / (into or name)))


def rendered(spec: ModelSpec, dtype: str = "float32", **values: Any) -> np.ndarray:
    loop = SlotLoop(lambda: load_model(describe(spec), Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        return loop.submit([row(**USUAL | values)])[0].result(timeout=120).pixels
    finally:
        loop.close()


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---------------------------------------------------------------------------------------------- variants


def with_variant(kind: Any, folder: Path, shard: str) -> Path:
    """The model's weights once more, halved and in half precision, in shards where they are larger than `shard`."""
    pipe = kind.from_pretrained(folder)
    with torch.no_grad():
        for name in ("unet", "transformer", "text_encoder"):
            for weights in getattr(getattr(pipe, name, None), "parameters", list)():
                weights *= 0.5
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name != "vae":  # a component may well be without
                config = (folder / name / "config.json").read_bytes()
                part.half().save_pretrained(folder / name, variant="fp16", max_shard_size=shard)
                (folder / name / "config.json").write_bytes(config)  # it would note the dtype
    return folder


@pytest.mark.parametrize(("name", "shard"), [("sd", "10GB"), ("sd", "500KB"), ("flux-dev", "100KB")])
def test_a_variant_renders_the_pixels_of_diffusers_with_it(name: str, shard: str, own: Callable[..., Path]) -> None:
    folder = with_variant(CLASSES[name], own(name), shard)
    changes = {} if name == "sd" else {"sampler": "flow-euler"}
    wanted = row(**USUAL | changes)
    plain = rendered(ModelSpec(id=str(folder)), **changes)
    np.testing.assert_array_equal(plain, reference(plain_pipeline(CLASSES[name], folder), wanted))
    pipe = plain_pipeline(CLASSES[name], folder, variant="fp16")
    half = rendered(ModelSpec(id=str(folder), variant="fp16"), **changes)
    np.testing.assert_array_equal(half, reference(pipe, wanted))
    assert (half != plain).any()


def test_hashes_and_sizes_are_of_the_files_that_the_variant_reads(own: Callable[..., Path]) -> None:
    folder = own("sd")
    without = weight_hashes(folder, safety_checker=False)
    before = about(ModelSpec(id=str(folder)))
    with_variant(CLASSES["sd"], folder, "500KB")
    assert weight_hashes(folder, safety_checker=False) == without, "the shards and their index are another variant's"
    found = weight_hashes(folder, "fp16", safety_checker=False)
    assert {file for file in found if file not in without} == {
        *(path.relative_to(folder).as_posix() for path in folder.rglob("*fp16*")),
    }
    assert {file for file in without if file not in found} == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    after = about(ModelSpec(id=str(folder), variant="fp16"))
    assert about(ModelSpec(id=str(folder)))["sha256"] == before["sha256"] != after["sha256"]
    numbers = [int(text.split(" MiB")[0].rpartition(" ")[2]) for text in (before["weights on disk"], after["weights on disk"])]
    assert numbers[1] * 2 <= numbers[0] + 1


def test_a_job_with_a_variant_is_verified_with_it_and_not_continued_without(
    own: Callable[..., Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = with_variant(CLASSES["sd"], own("sd"), "10GB")
    model = {"id": str(folder), "variant": "fp16", "sha256": about(ModelSpec(id=str(folder), variant="fp16"))["sha256"]}
    path = write_job(write_manifest({"prompt": ["a"]}), model=model, render=USUAL, workers={"batch_size": B})
    assert renderfarm.run(path, engine="inline").images == 1
    assert [again.result for again in verify(str(tmp_path / "out"), Choice(), str(folder)).again] == ["identical"]
    path = write_job(tmp_path / "prompts.parquet", model={"id": str(folder)}, render=USUAL, workers={"batch_size": B})
    with pytest.raises(InvalidJob, match=r'model\.variant: "fp16" there, null now'):
        renderfarm.run(path, engine="inline")


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(own: Callable[..., Path]) -> None:
    folder = own("sd")
    with pytest.raises(InvalidJob, match=r"no component has the variant fp16 \(\*\.fp16\.safetensors\); variants that there are: none"):
        describe(ModelSpec(id=str(folder), variant="fp16"))
    with_variant(CLASSES["sd"], folder, "10GB")
    with pytest.raises(InvalidJob, match=r"no component has the variant ema .*; variants that there are: fp16"):
        describe(ModelSpec(id=str(folder), variant="ema"))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InvalidJob, match=r"its unet has weights of a variant only: give variant: fp16"):
        describe(ModelSpec(id=str(folder)))


# ---------------------------------------------------------------------------------------------- components


def other(folder: Path, seed: int = 1) -> Path:
    """The same component with other weights."""
    (file,) = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tensor * (1 + torch.rand(tensor.shape, generator=generator) / 2) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        ("sd", "vae", diffusers.AutoencoderKL),
        ("sd", "unet", diffusers.UNet2DConditionModel),
        ("sd", "text_encoder", transformers.CLIPTextModel),
        ("flux-dev", "transformer", diffusers.FluxTransformer2DModel),
        ("flux2-klein", "vae", diffusers.AutoencoderKLFlux2),
    ],
)
def test_a_component_from_elsewhere_takes_the_place_of_the_models_own(
    model: str, name: str, kind: Any, own: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    folder, mine = tiny_model(model), other(own(model) / name)
    spec = ModelSpec(id=str(folder), components={name: {"id": str(mine)}})
    wanted = row(**USUAL | {"sampler": describe(spec).sampler})
    found = rendered(spec, sampler=wanted.sampler)
    np.testing.assert_array_equal(found, reference(plain_pipeline(CLASSES[model], folder, **{name: kind.from_pretrained(mine)}), wanted))
    assert (found != reference(plain_pipeline(CLASSES[model], folder), wanted)).any()
    whole = ModelSpec(id=str(folder), components={name: {"id": str(mine.parent), "subfolder": name}})
    np.testing.assert_array_equal(rendered(whole, sampler=wanted.sampler), found)
    assert about(spec)["sha256"] == about(whole)["sha256"] != about(ModelSpec(id=str(folder)))["sha256"]


def test_sizes_and_sampler_follow_the_components_that_are_loaded(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    wide = {"block_out_channels": (32, 32, 32), "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    families.vae(**wide).save_pretrained(tmp_path / "vae")
    diffusers.EulerAncestralDiscreteScheduler(beta_end=0.02).save_pretrained(tmp_path / "scheduler")
    others = {name: {"id": str(tmp_path / name)} for name in ("vae", "scheduler")}
    plain = describe(ModelSpec(id=str(tiny_model("sd"))))
    info = describe(ModelSpec(id=str(tiny_model("sd")), components=others))
    assert (plain.height, plain.max_side, plain.sampler) == (32, 128, "pndm")
    assert (info.height, info.max_side, info.sampler) == (64, 256, "euler-a")
    pipe = plain_pipeline(
        CLASSES["sd"], tiny_model("sd"), vae=diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(beta_end=0.02),
    )  # fmt: skip
    wanted = row(**USUAL | {"sampler": "euler-a"})
    found = rendered(ModelSpec(id=str(tiny_model("sd")), components=others), sampler="euler-a")
    np.testing.assert_array_equal(found, reference(pipe, wanted))


def test_a_job_with_a_component_from_elsewhere_is_verified_with_it_and_refused_with_another(
    own: Callable[..., Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = own("sd")
    other(own("sd", "other") / "vae").rename(tmp_path / "my-vae")
    model = {"id": str(folder), "components": {"vae": "./my-vae"}}
    path = write_job(write_manifest({"prompt": ["a", "b"]}), model=model, render=USUAL, workers={"batch_size": B}, output={"part_rows": 1})
    assert renderfarm.run(load_job(path), engine="inline").images == 2
    assert json.loads((tmp_path / "out/_renderfarm/job.json").read_text())["model"]["components"]["vae"]["id"] == "my-vae"
    with pytest.raises(InvalidJob, match=r"rendered with a vae in a folder named 'my-vae'; say where it is: --model vae=FOLDER"):
        verify(str(tmp_path / "out"), Choice(), str(folder))
    with pytest.raises(InvalidJob, match=r"--model unet=…: the output was rendered with no such part from elsewhere"):
        verify(str(tmp_path / "out"), Choice(), str(folder), {"vae": f"{tmp_path}/my-vae", "unet": f"{folder}/unet"})
    verified = verify(str(tmp_path / "out"), Choice(), str(folder), {"vae": f"{tmp_path}/my-vae"})
    assert [again.result for again in verified.again] == ["identical"] * 2
    with pytest.raises(InvalidJob, match=r"model\.components"):
        renderfarm.run(write_job(tmp_path / "prompts.parquet", model={"id": str(folder)}, render=USUAL, workers={"batch_size": B},
                                 output={"part_rows": 1}), engine="inline")  # fmt: skip
    next((tmp_path / "out/data").glob("part-00000001/metadata.parquet")).unlink()  # so that there is something to render
    shutil.rmtree(tmp_path / "out/_renderfarm/parts")
    other(tmp_path / "my-vae", seed=2)
    path = write_job(tmp_path / "prompts.parquet", model=model, render=USUAL, workers={"batch_size": B}, output={"part_rows": 1})
    with pytest.raises(ProfileMismatch, match=r"weights\.vae/diffusion_pytorch_model\.safetensors"):
        renderfarm.run(load_job(path), engine="inline")


def written_as_gguf(weights: Path, file: Path) -> Path:
    """A model's weights in eight bits, where rows are whole blocks of 32."""
    eight_bits, writer = gguf.GGMLQuantizationType.Q8_0, gguf.GGUFWriter(file, "diffusers")
    for name, tensor in load_file(weights).items():
        array = tensor.float().numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, eight_bits), raw_dtype=eight_bits)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(("name", "dtype"), [("flux-dev", "float32"), ("flux-dev", "bfloat16"), ("sd3", "float32"), ("sd", "float32")])
def test_a_denoiser_from_a_gguf_file_renders_the_pixels_of_diffusers_with_it(
    name: str, dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, part = tiny_model(name), "unet" if name == "sd" else "transformer"
    file = written_as_gguf(folder / part / "diffusion_pytorch_model.safetensors", tmp_path / "q8.gguf")
    spec = ModelSpec(id=str(folder), components={part: {"id": str(file)}})
    rows = [
        row(k, prompt=prompt, **USUAL | {"sampler": describe(spec).sampler, "num_inference_steps": 2 + k})
        for k, prompt in enumerate("abcd")
    ]
    loop = SlotLoop(lambda: load_model(describe(spec), Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        model = loop.ready.result()
        check_places(model, rows[0])
        assert model.profile()["gguf"]
        assert f"{part}/diffusion_pytorch_model.gguf" in model.profile()["weights"]
        made = [future.result(timeout=120).pixels for future in loop.submit(rows)]
    finally:
        loop.close()
    kind, number = getattr(diffusers, json.loads((folder / "model_index.json").read_text())[part][1]), getattr(torch, dtype)
    loaded = kind.from_single_file(
        str(file), quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=number), config=str(folder), subfolder=part,
        dtype=number,
    )  # fmt: skip
    pipe = plain_pipeline(CLASSES[name], folder, dtype, **{part: loaded})
    for wanted, ours in zip(rows, made, strict=True):
        np.testing.assert_array_equal(ours, reference(pipe, wanted))
    assert (made[0] != reference(plain_pipeline(CLASSES[name], folder, dtype), rows[0])).any()
    assert about(spec)["sha256"] != about(ModelSpec(id=str(folder)))["sha256"]


def test_a_gguf_file_that_is_none_or_another_models_ends_with_the_reason(
    tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("flux-dev")
    written_as_gguf(tiny_model("sd") / "unet/diffusion_pytorch_model.safetensors", tmp_path / "other.gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"x" * 100)

    def run(file: str, part: str = "transformer") -> None:
        job = write_job(write_manifest(), model={"id": str(folder), "components": {part: file}}, workers={"batch_size": B})
        renderfarm.run(load_job(job, out=str(tmp_path / "out" / f"{len(list(tmp_path.glob('out/*')))}")), engine="inline")

    for file in ("./other.gguf", "./damaged.gguf"):
        with pytest.raises(Fatal, match=r"model\.components\.transformer: .*\.gguf cannot be loaded as FluxTransformer2DModel: "):
            run(file)
    with pytest.raises(InvalidJob, match=r"no such file on .*/gone\.gguf; write it as \./x\.gguf"):
        run("./gone.gguf")
    with pytest.raises(
        InvalidJob, match=r"text_encoder: a \.gguf file can take the place of a denoiser of diffusers, not of CLIPTextModel"
    ):
        run("./other.gguf", "text_encoder")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, real=importlib.util.find_spec: None if name == "gguf" else real(name))
    with pytest.raises(Fatal, match=r"a \.gguf file needs the package gguf: pip install 'renderfarm\[gguf\]'"):
        run("./other.gguf", "transformer")


def test_parts_are_named_on_the_command_line_as_in_a_job(tiny_model: Callable[[str], Path], own: Callable[..., Path]) -> None:
    folder, mine = with_variant(CLASSES["sd"], own("sd"), "10GB"), other(own("sd", "other") / "vae")
    command = ["-m", "renderfarm", "models", "--model", str(folder), "--variant", "fp16", "--component", f"vae={mine}", "--json"]
    told = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    assert json.loads(told)["sha256"] == about(ModelSpec(id=str(folder), variant="fp16", components={"vae": {"id": str(mine)}}))["sha256"]
    for wrong in ("vae", "vae=", "=./x"):
        with pytest.raises(InvalidJob, match=r"write it as NAME=FOLDER or NAME=org/name@COMMIT/SUBFOLDER"):
            model_spec(str(folder), [wrong])
    spec = model_spec(str(folder), [f"vae=org/name@{'a' * 40}/sub/vae"])
    assert spec.components["vae"] == ComponentSpec(id="org/name", revision="a" * 40, subfolder="sub/vae")
    assert _model_and_parts(["./m", "vae=./v", "controlnet=/c"]) == ("./m", {"vae": "./v", "controlnet": "/c"})
    assert _model_and_parts(["/m=1"]) == ("/m=1", {})
    with pytest.raises(InvalidJob, match=r"--model is given twice \(a and b\)"):
        _model_and_parts(["a", "b"])


NOT_TAKEN: dict[str, tuple[str, Any, str]] = {
    "unknown name": ("vea", "./vae", r"has no vea; its components: scheduler, text_encoder, tokenizer, unet, vae"),
    "no folder": ("vae", "./gone", r"model\.components\.vae: no such folder on "),
    "no component": ("vae", "./", r"model\.components\.vae: .* is no component in diffusers' format \(no config\.json\)"),
    "one file": ("vae", "./vae.ckpt", r"model\.components\.vae: .*vae\.ckpt is one file; give a folder"),
    "pickled weights": ("vae", "./pickled", r"its vae has pickled weights only \(diffusion_pytorch_model\.bin\)"),
    "another kind": ("text_encoder", "./t5", r"model\.components\.text_encoder: it is a t5, and the model needs a clip_text_model"),
    "another part": (
        "vae",
        "./denoiser",
        r"model\.components\.vae: it is a UNet2DConditionModel, a denoiser, .* give another of that kind",
    ),
    "code": ("text_encoder", "./code", r"model\.components\.text_encoder/config\.json asks for code of its own"),
    "no commit": ("vae", {"id": "org/vae"}, r"model\.components\.vae: a hub model needs its full commit"),
    "password": ("vae", "s3://me:secret@host/vae", r"the URL in model\.components\.vae holds credentials"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_is_no_component_of_the_model_is_refused_before_a_worker_starts(
    name: str, own: Callable[..., Path], tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    part, given, message = NOT_TAKEN[name]
    if name == "code":
        change(shutil.copytree(tiny_model("sd") / "text_encoder", tmp_path / "code") / "config.json", auto_map={"AutoModel": "m.My"})
    elif name == "one file":
        (tmp_path / "vae.ckpt").write_bytes(b"x")
    elif name == "pickled weights":
        folder = Path(shutil.copytree(tiny_model("sd") / "vae", tmp_path / "pickled"))
        next(folder.glob("*.safetensors")).rename(folder / "diffusion_pytorch_model.bin")
    elif name == "another kind":
        shutil.copytree(tiny_model("flux-dev") / "text_encoder_2", tmp_path / "t5")
    elif name == "another part":
        shutil.copytree(tiny_model("sd") / "unet", tmp_path / "denoiser")
    model = {"id": str(tiny_model("sd")), "components": {part: given}}
    with pytest.raises(InvalidJob, match=message):
        renderfarm.run(load_job(write_job(write_manifest(), model=model)), engine="inline")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- quantised while loading

EIGHT_BITS: dict[str, Any] = {"backend": "torchao", "arguments": {"quant_type": "Int8WeightOnlyConfig"}}


@pytest.mark.parametrize(
    ("name", "parts", "dtype"),
    [("flux-dev", ["transformer"], "float32"), ("sd", ["unet", "text_encoder"], "float32"), ("qwen-image", ["transformer"], "bfloat16")],
)
def test_quantised_components_render_the_pixels_of_diffusers_with_them(
    name: str, parts: list[str], dtype: str, tiny_model: Callable[[str], Path]
) -> None:
    spec = ModelSpec(id=str(tiny_model(name)), quantization=EIGHT_BITS | {"components": parts})
    usual = USUAL | {"sampler": describe(spec).sampler, "guidance_scale": 1.0}
    rows = [row(k, prompt=prompt, **usual | {"num_inference_steps": 2 + k % 2}) for k, prompt in enumerate("abcd")]
    loop = SlotLoop(lambda: load_model(describe(spec), Workers(batch_size=B, dtype=dtype)))  # type: ignore[arg-type]
    try:
        model = loop.ready.result()
        check_places(model, rows[0])
        assert model.profile()["quantization"] == {**EIGHT_BITS, "components": parts, "version": torchao.__version__.partition("+")[0]}
        made = [future.result(timeout=120).pixels for future in loop.submit(rows)]
    finally:
        loop.close()
    libraries = {part: transformers if part == "text_encoder" else diffusers for part in parts}
    mapping = {part: library.TorchAoConfig(Int8WeightOnlyConfig()) for part, library in libraries.items()}
    config = diffusers.PipelineQuantizationConfig(quant_mapping=mapping)
    pipe = plain_pipeline(CLASSES[name], tiny_model(name), dtype, quantization_config=config)
    for wanted, ours in zip(rows, made, strict=True):
        np.testing.assert_array_equal(ours, reference(pipe, wanted))
    assert (made[0] != reference(plain_pipeline(CLASSES[name], tiny_model(name), dtype), rows[0])).any()


def test_a_job_with_quantised_components_is_verified_with_them(
    own: Callable[..., Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    folder = own("flux-dev")
    model = {"id": str(folder), "quantization": EIGHT_BITS | {"components": ["transformer"]}}
    small = {"num_inference_steps": 2, "height": 32, "width": 32}
    path = write_job(write_manifest({"prompt": ["a"]}), model=model, render=small, workers={"batch_size": B})
    assert renderfarm.run(path, engine="inline").images == 1
    assert [again.result for again in verify(str(tmp_path / "out"), Choice(), str(folder)).again] == ["identical"]
    path = write_job(tmp_path / "prompts.parquet", model=str(folder), render=small, workers={"batch_size": B})
    with pytest.raises(InvalidJob, match=r"model\.quantization: \{.*torchao.*\} there, null now"):
        renderfarm.run(path, engine="inline")


def with_mates(config: Any) -> bool:
    """Whether a sample's numbers are the same beside another one that has larger numbers."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(128, 128))
    torchao.quantization.quantize_(layer, config)
    batch = torch.randn(2, 16, 128)
    other = torch.stack([batch[0], 30 * batch[1]])
    with torch.no_grad():
        return torch.equal(layer(batch)[0], layer(other)[0])


def test_activations_scaled_by_the_whole_batch_depend_on_mates() -> None:
    """Why they are refused."""
    eight_bits = torchao.quantization.Int8DynamicActivationInt8WeightConfig
    assert with_mates(eight_bits())
    assert with_mates(eight_bits(granularity=PerRow()))
    assert with_mates(torchao.quantization.Int8DynamicActivationIntxWeightConfig())
    assert not with_mates(eight_bits(granularity=PerTensor()))


FLOAT8 = "Float8DynamicActivationFloat8WeightConfig"
OVER_THE_BATCH: list[tuple[str, dict[str, Any], str]] = [
    ("bitsandbytes", {"load_in_8bit": True}, "load_in_8bit takes columns out .*; use load_in_4bit, or torchao's Int8WeightOnlyConfig"),
    ("quanto", {"weights_dtype": "int8", "activations": "int8"}, "quanto's activations are scaled .*; leave activations out"),
    ("torchao", {"quant_type": FLOAT8}, f"{FLOAT8} scales activations by the whole batch, .*; give it granularity: PerRow"),
    ("torchao", {"quant_type": FLOAT8, "granularity": "PerTensor"}, FLOAT8),
    ("torchao", {"quant_type": "Int8DynamicActivationInt8WeightConfig", "granularity": "PerTensor"}, "Int8DynamicActivation"),
    ("torchao", {"quant_type": "Int8DynamicActivationInt8WeightConfig", "granularity": ["PerTensor", "PerRow"]}, "Int8Dynamic"),
]


@pytest.mark.parametrize(("backend", "arguments", "message"), OVER_THE_BATCH)
def test_a_quantisation_by_which_mates_matter_is_refused_before_work_starts(
    backend: str, arguments: dict[str, Any], message: str, tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write
) -> None:
    model = {"id": str(tiny_model("flux-dev"))}
    quantization = {"backend": backend, "components": ["transformer"], "arguments": arguments}
    with pytest.raises(InvalidJob, match=f"model.quantization: {message}"):
        prepare(load_job(write_job(write_manifest(), model=model | {"quantization": quantization})))


@pytest.mark.parametrize("quant_type", ["Int8DynamicActivationInt8WeightConfig", FLOAT8])
def test_a_job_can_ask_for_scales_of_each_token(quant_type: str, tiny_model: Callable[[str], Path]) -> None:
    """Only how it reaches torchao: float8 needs a GPU."""
    arguments = {"quant_type": quant_type, "granularity": "PerRow"}
    quantization = {"backend": "torchao", "components": ["transformer"], "arguments": arguments}
    config = load_arguments(describe(ModelSpec(id=str(tiny_model("flux-dev")), quantization=quantization)))  # type: ignore[arg-type]
    granularity = config["quantization_config"].quant_mapping["transformer"].quant_type.granularity
    assert granularity in (PerRow(), [PerRow(), PerRow()])


EIGHT_ROWS = torchao.quantization.Int8DynamicActivationInt8WeightConfig()
PER_TENSOR = torchao.quantization.Float8DynamicActivationFloat8WeightConfig()


@pytest.mark.parametrize(
    ("saved", "refused"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, False),
        (diffusers.TorchAoConfig(PER_TENSOR).to_dict(), True),
        (diffusers.TorchAoConfig(EIGHT_ROWS).to_dict(), False),
        (diffusers.TorchAoConfig(torchao.quantization.FqnToConfig({"a": EIGHT_ROWS, "re:b.*": PER_TENSOR})).to_dict(), True),
        (diffusers.TorchAoConfig(torchao.quantization.Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())).to_dict(), False),
        ({"quant_method": "torchao", "quant_type": "damaged"}, False),
    ],
)
def test_weights_that_were_saved_with_such_a_quantisation_are_refused(
    saved: dict[str, Any], refused: bool, own: Callable[..., Path]
) -> None:
    folder = own("flux-dev")
    change(folder / "transformer/config.json", quantization_config=json.loads(json.dumps(saved)))
    expected = pytest.raises(InvalidJob, match=r"the quantization_config of transformer/config\.json: .* depend on its batch mates")
    with expected if refused else contextlib.nullcontext():
        describe(ModelSpec(id=str(folder)))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            {"components": ["transfomer"]},
            InvalidJob,
            r"model\.quantization\.components: .* has no transfomer; its components: .*transformer",
        ),
        ({"components": ["scheduler"]}, InvalidJob, r"scheduler has no weights; leave it out"),
        ({"components": []}, InvalidJob, r"model\.quantization\.components: "),
        ({"backend": "int8"}, InvalidJob, r"model\.quantization\.backend: .*'torchao', 'quanto' or 'bitsandbytes'"),
        ({"arguments": {}}, Fatal, r"model\.quantization: torchao does not take these arguments: .*None"),
        ({"arguments": {"quant_type": "Int8WeightOnlyConfig", "bits": 3}}, Fatal, r"torchao does not take these arguments: .*bits"),
        ({"backend": "bitsandbytes"}, Fatal, r"bitsandbytes needs the package bitsandbytes: pip install bitsandbytes"),
        ({"backend": "quanto"}, Fatal, r"quanto needs the package optimum-quanto: pip install optimum-quanto"),
    ],
)
def test_a_quantisation_that_cannot_be_done_ends_with_the_reason(
    given: dict[str, Any], kind: Any, message: str, tiny_model: Callable[[str], Path], write_manifest: Write, write_job: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gone, real = {"bitsandbytes", "optimum"}, importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in gone else real(name, *more))
    model = {"id": str(tiny_model("flux-dev")), "quantization": {**EIGHT_BITS, "components": ["transformer"], **given}}
    with pytest.raises(kind, match=message):
        renderfarm.run(load_job(write_job(write_manifest(), model=model)), engine="inline")


# ---------------------------------------------------------------------------------------------- refused


def pickled(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")


def forgotten(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled weights": (pickled, r"its unet has pickled weights only \(diffusion_pytorch_model\.bin\), which may hold code"),
    "no weights": (forgotten, r"its vae has no \.safetensors file; was the model copied or fetched to its end\?"),
    "custom pipeline": (
        lambda f: change(f / "model_index.json", _class_name=["pipe", "MyPipeline"]),
        "a custom pipeline, whose code",
    ),
    "custom pipeline by name": (lambda f: change(f / "model_index.json", custom_pipeline="lpw"), "a custom pipeline, whose"),
    "custom component": (
        lambda f: change(f / "model_index.json", unet=["my_unet", "MyUNet"]),
        r"its unet is MyUNet of my_unet, which is neither diffusers' nor transformers'; code that comes with a model is never run",
    ),
    "auto_map": (
        lambda f: change(f / "text_encoder/config.json", auto_map={"AutoModel": "modeling.My"}),
        r"text_encoder/config\.json asks for code of its own \(auto_map\), which is never run",
    ),
    "auto_map of a tokenizer": (
        lambda f: change(f / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["t.My", None]}),
        r"tokenizer/tokenizer_config\.json asks for code of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_run_code_or_cannot_be_loaded_is_refused_before_a_worker_starts(
    name: str, own: Callable[..., Path], write_manifest: Write, write_job: Write, tmp_path: Path
) -> None:
    damage, message = REFUSED[name]
    folder = own("sd")
    describe(ModelSpec(id=str(folder)))
    damage(folder)
    with pytest.raises(InvalidJob, match=message):
        renderfarm.run(load_job(write_job(write_manifest(), model=str(folder))), engine="inline")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_model_in_one_file_is_refused_with_the_way_to_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InvalidJob, match=r"is one file; give a folder in diffusers' format \(diffusers' from_single_file"):
        describe(ModelSpec(id=str(tmp_path / name)))
    with pytest.raises(InvalidJob, match=r"no such folder on .*; every node must find it under this path"):
        describe(ModelSpec(id=str(tmp_path / "gone")))


def test_a_safety_checker_of_a_pipelines_own_module_is_no_foreign_code(tmp_path: Path) -> None:
    folder = families.save(families.checked(False), tmp_path / "checked")
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"][0] == "stable_diffusion"
    describe(ModelSpec(id=str(folder), safety_checker=True))
