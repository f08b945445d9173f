"""The memory that weights need, counted from configurations: against loaded pipelines, and against where hooks put them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import call_families
import diffusers
import face_files
import families
import pytest
import torch
import upscalers
from diffusers.pipelines.pipeline_loading_utils import _assign_components_to_devices
from hub import COMMIT, served
from oracle import CLASSES, LEGAL, plain_pipeline, row
from pictures_given import encoded, mask, picture
from test_adapters import make_adapter
from test_loading import written_as_gguf

from renderfarm.config import Quantization, Workers
from renderfarm.jobfile import load_job
from renderfarm.models.load import load_model
from renderfarm.models.sizes import DTYPES, component_weights, file_weights, pipeline_weights
from renderfarm.needs import dealt, held_at_once, needs, parts_of, weight_bits
from renderfarm.preparation import Prepared, prepare
from renderfarm.records import InputImage
from renderfarm.slots import SlotLoop

Write = Callable[..., Path]
Tiny = Callable[[str], Path]
BUILDERS = families.BUILDERS | call_families.BUILDERS
PIPELINES = [name for name in BUILDERS if not name.endswith("-controlnet")]
BUFFERS = 256  # bytes: a few tables of a few numbers are made in another dtype when a model is loaded


def without_weights(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def size(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def agrees(module: torch.nn.Module, weights: Any, dtype: str) -> None:
    assert weights.numbers == sum(parameter.numel() for parameter in module.parameters())
    assert abs(weights.memory[dtype] - size(module)) <= BUFFERS
    own = [[*part.parameters(recurse=False), *part.buffers(recurse=False)] for part in module.modules()]
    assert abs(weights.layer[dtype] - max(sum(tensor.nbytes for tensor in tensors) for tensors in own)) <= BUFFERS


@pytest.mark.parametrize("name", PIPELINES)
def test_a_folder_without_weights_tells_what_the_loaded_pipeline_takes(name: str, tiny_model: Tiny, tmp_path: Path) -> None:
    """In float16, T5 keeps some of its layers in float32."""
    bare = without_weights(tiny_model(name), tmp_path / "bare")
    assert not list(bare.rglob("*.safetensors"))
    counted = pipeline_weights(bare)
    kind = getattr(diffusers, json.loads((bare / "model_index.json").read_text())["_class_name"])
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-dynamic" else {}
    for dtype in DTYPES:
        loaded = modules(kind.from_pretrained(tiny_model(name), dtype=getattr(torch, dtype), **absent))
        assert counted.keys() == loaded.keys()
        for part, module in loaded.items():
            agrees(module, counted[part], dtype)


def test_a_controlnet_and_a_safety_checker_are_counted_as_they_are_loaded(tiny_model: Tiny, tmp_path: Path) -> None:
    bare = without_weights(tiny_model("sdxl-controlnet"), tmp_path / "bare")
    loaded = diffusers.ControlNetModel.from_pretrained(tiny_model("sdxl-controlnet"), dtype=torch.bfloat16)
    agrees(loaded, component_weights(bare, "diffusers", "ControlNetModel"), "bfloat16")
    pipe = families.checked(True)
    pipe.save_pretrained(tmp_path / "checked")
    checked = without_weights(tmp_path / "checked", tmp_path / "bare-checked")
    agrees(pipe.safety_checker, pipeline_weights(checked)["safety_checker"], "float32")
    assert "safety_checker" not in pipeline_weights(checked, None, {"safety_checker"})


def change(folder: Path, **values: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def test_where_a_configuration_says_nothing_files_do_or_it_is_unknown(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("sd"), tmp_path / "sd"))
    plain = pipeline_weights(folder)
    change(folder / "unet", block_out_channels=[32, "many"])
    found = pipeline_weights(folder)
    assert found["unet"] is not None
    assert plain["unet"] is not None
    assert (found["unet"].numbers, found["unet"].memory) == (plain["unet"].numbers, plain["unet"].memory)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    assert pipeline_weights(folder)["unet"] is None
    assert pipeline_weights(folder)["vae"] == plain["vae"]


def test_weights_that_are_stored_quantised_keep_their_bits(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {"packed": torch.zeros(100, 50, dtype=torch.uint8), "scales": torch.zeros(100), "norm": torch.zeros(7, dtype=torch.bfloat16)},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    found = component_weights(tmp_path, "diffusers", "FluxTransformer2DModel")
    assert found is not None
    assert found.memory == {"float32": 5000 + 4 * 107, "bfloat16": 5000 + 2 * 107, "float16": 5000 + 2 * 107}
    assert found.layer["bfloat16"] == 5000
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert component_weights(tmp_path, "diffusers", "FluxTransformer2DModel") is None


def test_a_gguf_file_counts_as_it_is(tiny_model: Tiny, tmp_path: Path, job: Any) -> None:
    folder = tiny_model("flux-dev")
    file = written_as_gguf(folder / "transformer/diffusion_pytorch_model.safetensors", tmp_path / "q8.gguf")
    prepared = job({"id": str(folder), "components": {"transformer": str(file)}})
    adapter: Any = load_model(prepared.model, Workers())
    found = parts_of(prepared).components
    assert 0 <= found["transformer"] - sum(weights.nbytes for weights in adapter.pipe.transformer.parameters()) < 10_000, "names and shapes"
    assert found["vae"] == size(adapter.pipe.vae)


# ---------------------------------------------------------------------------------------------- a model on the hub


ASK = f"""
import sys
from renderfarm.cli import app
for options in sys.argv[1:]:
    app(["models", "--model", "org/name@{COMMIT}", "--json", *options.split()], standalone_mode=False)
"""


def test_a_hub_model_is_known_without_its_weights_and_its_hash_only_with_them(tiny_model: Tiny, tmp_path: Path) -> None:
    def ask(hub: Any, *options: str) -> list[dict[str, Any]]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = plain | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url}
        told = subprocess.run([sys.executable, "-c", ASK, *options], env=environment, capture_output=True, text=True, check=True).stdout
        return list(map(json.loads, told.splitlines()))

    folder = tiny_model("sdxl")
    with served(folder) as hub:
        (known,) = ask(hub, "")
        assert {name.rpartition("/")[2] for name in hub.fetched()} == {
            *("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json")
        }
        fetched, again = ask(hub, "--fetch", "")
    assert again == fetched, "what is there is hashed without being asked for"
    assert known["sha256"] is None
    assert "that are not on this machine; --fetch fetches them" in known["for sha256"]
    assert len(fetched["sha256"]) == 64
    numbers = {
        name: sum(weights.numel() for weights in part.parameters())
        for name, part in modules(plain_pipeline(CLASSES["sdxl"], folder)).items()
    }
    assert known["weights in memory"] == fetched["weights in memory"]
    assert known["weights in memory"].startswith(f"float32 {sum(numbers.values()) * 4 / 2**20:,.0f} MiB, ")
    assert known["with workers.offload: model"].startswith(f"float32 {numbers['unet'] * 4 / 2**20:,.0f} MiB, ")


# ---------------------------------------------------------------------------------------------- what a job needs


@pytest.fixture
def job(write_manifest: Write, write_job: Write) -> Callable[..., Prepared]:
    def prepared(model: Any, images: tuple[str, ...] = (), **changes: Any) -> Prepared:
        manifest = write_manifest({"prompt": ["a"], **{name: ["x.png"] for name in images}})
        return prepare(load_job(write_job(manifest, model=model, **{"render": {}} | changes)))

    return prepared


@pytest.mark.parametrize(
    ("name", "beside", "images"),
    [
        ("sd", {}, ()),
        ("sd", {}, ("image",)),
        ("sd", {"controlnet": "sd-controlnet"}, ("control_image",)),
        ("sd", {"controlnet": "sd-controlnet"}, ("image", "control_image")),
        ("flux-dev", {}, ("image", "mask_image")),
        ("sdxl", {"refiner": "sdxl-refiner"}, ()),
        ("deepfloyd", {"super_resolution": "deepfloyd-second"}, ()),
    ],
)
def test_what_a_job_needs_is_what_its_worker_loads_and_the_hooks_bring_to_the_device(
    name: str, beside: dict[str, str], images: tuple[str, ...], job: Any, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's hooks, with a list in place of the device: what was there at once, at the most."""
    model: dict[str, Any] = {"id": str(tiny_model(name)), **{kind: {"id": str(tiny_model(folder))} for kind, folder in beside.items()}}
    if "super_resolution" in beside:
        model["super_resolution"]["num_inference_steps"] = 2
    adapter: Any = load_model(job(model, images).model, Workers(batch_size=2))
    pipes = [adapter.pipe, *([adapter.refiner] if "refiner" in beside else []), *getattr(adapter, "stages", {}).values()]
    loaded = {id(part): part for pipe in pipes for part in modules(pipe).values()}
    prepared = job(model, images, workers={"offload": "model"})
    parts = parts_of(prepared)
    assert abs(parts.total - sum(map(size, loaded.values()))) <= BUFFERS * len(loaded)

    here, most = set[int](), [0]

    def arrive(hook: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        here.add(id(module))
        most[0] = max(most[0], sum(size(loaded[one]) for one in here))
        return args, kwargs

    real = diffusers.DiffusionPipeline.maybe_free_model_hooks

    def free(pipe: Any) -> None:
        here.difference_update(map(id, modules(pipe).values()))
        real(pipe)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", arrive)
    monkeypatch.setattr(accelerate.hooks.UserCpuOffloadHook, "offload", lambda hook: here.discard(id(hook.model)))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "maybe_free_model_hooks", free)
    adapter.workers = Workers(batch_size=2, offload="model")
    for pipe in pipes:
        adapter._place(pipe)
    given = {kind: InputImage(None, encoded(mask() if kind == "mask_image" else picture())) for kind in images}
    more: dict[str, Any] = {"strength": 0.8} if "image" in images else {}
    more |= {"denoising_end": 0.5} if "refiner" in beside else {}
    more |= (
        {"controlnet_conditioning_scale": 1.0, "control_guidance_start": 0.0, "control_guidance_end": 1.0} if "controlnet" in beside else {}
    )
    side = prepared.model.height if name == "deepfloyd" else 32
    rows = [row(k, sampler=LEGAL[name][0], num_inference_steps=4, height=side, width=side, **more, **given) for k in range(3)]
    loop = SlotLoop(lambda: adapter)
    try:
        assert [future.result(timeout=120).pixels.shape for future in loop.submit(rows)] == [(side, side, 3)] * 3
    finally:
        loop.close()
    assert abs(held_at_once(parts, prepared)[0] - most[0]) <= BUFFERS * len(loaded)


def test_of_a_job_offloaded_layer_by_layer_the_largest_layer_counts(job: Any, tiny_model: Tiny) -> None:
    prepared = job(str(tiny_model("flux-dev")), workers={"offload": "sequential", "dtype": "bfloat16"})
    layers = [
        sum(tensor.nbytes for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)))
        for module in modules(plain_pipeline(CLASSES["flux-dev"], tiny_model("flux-dev"), "bfloat16")).values()
        for part in module.modules()
    ]
    assert held_at_once(parts_of(prepared), prepared) == (max(layers), "the largest layer: workers.offload is sequential")


@pytest.mark.parametrize("devices", [2, 3, 5])
def test_components_are_dealt_to_devices_as_diffusers_does(devices: int, job: Any, tiny_model: Tiny) -> None:
    prepared = job(str(tiny_model("sd3")), workers={"devices_per_worker": devices})
    parts = parts_of(prepared)
    sizes = dict(sorted(parts.components.items(), key=lambda part: -part[1]))
    theirs = _assign_components_to_devices(sizes, dict.fromkeys(range(devices), 1 << 30))
    held = [sum(sizes[name] for name in theirs.get(device, [])) for device in range(devices)]
    assert dealt(parts.components.values(), devices) == held
    assert held_at_once(parts, prepared)[0] == max(held)


def test_a_job_is_told_what_each_device_and_machine_must_hold(job: Any, tiny_model: Tiny, tmp_path: Path) -> None:
    """MiB of a whole model are more than those of tiny ones can show: builtin:shapes has some."""
    plain = needs(job("builtin:shapes", workers={"dtype": "float32"}))
    assert plain["weights (MiB)"].keys() == {"text_encoder", "unet", "vae"}
    assert plain["on each device (MiB)"] == plain["weights together (MiB)"] == 21
    assert plain["on each device is"] == "all of them"
    assert "not counted" not in plain
    assert "a batch of 4 at 64×64 pixels needs, and torch's own share, only rendering tells" in plain["beside them"]
    half = needs(job("builtin:shapes", workers={"dtype": "bfloat16"}))
    assert half["on each device (MiB)"] == 11
    shared = needs(job("builtin:shapes", workers={"devices_per_worker": 0.25, "max": 3}))
    assert shared["on each device (MiB)"] == 63
    assert shared["on each device is"] == "all of them, for each of the 3 workers that share a device"
    away = needs(job("builtin:shapes", workers={"offload": "model"}))
    assert (away["on each device (MiB)"], away["in the machine's memory (MiB)"]) == (plain["weights (MiB)"]["unet"], 21)
    assert needs(job("builtin:shapes", workers={"device": "cpu"}))["in the machine's memory is"] == "all of them"
    assert needs(job("builtin:fake"))["weights together (MiB)"] == 0


def test_adapters_and_networks_count_as_they_are_loaded(job: Any, tiny_model: Tiny, tmp_path: Path) -> None:
    file = make_adapter(CLASSES["sd"], tiny_model("sd"), tmp_path / "one.safetensors", 0)
    network = upscalers.random_network(upscalers.RRDBNet, scale=2)
    weights = upscalers.save(network, tmp_path / "up.safetensors")
    (tmp_path / "yunet.onnx").write_bytes(face_files.detector())
    faces = {"weights": str(face_files.network_file(tmp_path / "faces.safetensors")), "detector": str(tmp_path / "yunet.onnx")}
    prepared = job(
        {"id": str(tiny_model("sd")), "adapters": {"one": str(file)}},
        workers={"dtype": "bfloat16"},
        after=[{"colour": {"saturation": 1.1}}, {"upscale": {"weights": str(weights)}}, {"restore_faces": faces}],
    )
    adapter: Any = load_model(prepared.model, Workers(dtype="bfloat16"))
    lora = sum(tensor.nbytes for module in modules(adapter.pipe).values() for name, tensor in module.named_parameters() if "lora_" in name)
    assert lora > 0
    upscaling = sum(tensor.numel() * 2 for tensor in network.parameters())
    restoring = sum(tensor.nbytes for tensor in face_files.weights().values())  # in float32, whatever the model is in
    assert parts_of(prepared).beside == {"adapter one": lora, "after 1": upscaling, "after 2": restoring}
    file.write_bytes(b"damaged")
    assert file_weights(file) is None


# ---------------------------------------------------------------------------------------------- quantised


def inner(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return [tensor]
    return [piece for name in tensor.__tensor_flatten__()[0] for piece in inner(getattr(tensor, name))]


@pytest.mark.parametrize(
    ("name", "parts"),
    [("flux-dev", ["transformer", "text_encoder_2"]), ("sd", ["unet", "text_encoder"]), ("qwen-image", ["transformer", "text_encoder"])],
)
def test_eight_bit_layers_count_as_torchao_makes_them_but_for_its_scales(name: str, parts: list[str], job: Any, tiny_model: Tiny) -> None:
    quantization = {"backend": "torchao", "components": parts, "arguments": {"quant_type": "Int8WeightOnlyConfig"}}
    prepared = job({"id": str(tiny_model(name)), "quantization": quantization}, workers={"dtype": "bfloat16"})
    found = parts_of(prepared)
    adapter: Any = load_model(prepared.model, Workers(dtype="bfloat16"))
    for part in parts:
        pieces = [piece for tensor in getattr(adapter.pipe, part).parameters() for piece in inner(tensor)]
        rows = sum(piece.shape[0] for piece in pieces if piece.dtype == torch.int8 and piece.ndim == 2 and piece.shape[1] > 1)
        actual = sum(piece.nbytes for piece in pieces)
        assert 0 <= actual - found.components[part] <= rows * 9, "a scale and a zero for each row of a matrix"
        assert found.not_counted[part] == "the scales that torchao keeps beside 8-bit weights"


@pytest.mark.parametrize(
    ("backend", "arguments", "bits"),
    [
        ("torchao", {"quant_type": "Int8WeightOnlyConfig"}, 8),
        ("torchao", {"quant_type": "Int8DynamicActivationInt4WeightConfig"}, 4),
        ("torchao", {"quant_type": "Float8DynamicActivationFloat8WeightConfig"}, 8),
        ("torchao", {"quant_type": "IntxWeightOnlyConfig"}, None),
        ("quanto", {"weights_dtype": "int2"}, 2),
        ("quanto", {}, None),
        ("bitsandbytes", {"load_in_4bit": True}, 4),
        ("bitsandbytes", {"load_in_8bit": True}, 8),
        ("bitsandbytes", {}, None),
    ],
)
def test_the_backends_arguments_say_how_many_bits_a_weight_has(backend: Any, arguments: dict[str, Any], bits: int | None) -> None:
    assert weight_bits(Quantization(backend=backend, components=("unet",), arguments=arguments)) == bits


def test_what_a_quantisation_saves_is_said_to_be_unknown_where_its_arguments_do_not_say(job: Any, tiny_model: Tiny) -> None:
    quantization = {"backend": "quanto", "components": ["unet"], "arguments": {"weights_dtype": "odd"}}
    found = parts_of(job({"id": str(tiny_model("sd")), "quantization": quantization}))
    plain = parts_of(job(str(tiny_model("sd"))))
    assert found.components == plain.components
    assert found.not_counted == {"unet": "what quanto saves with these arguments; it is counted as if it were not quantised"}


# ---------------------------------------------------------------------------------------------- the command line


def test_models_tells_what_a_job_needs_or_what_a_model_is(job: Any, tmp_path: Path) -> None:
    job("builtin:shapes")
    command = [sys.executable, "-m", "renderfarm", "models", "--job", str(tmp_path / "job.yaml")]
    told = subprocess.run([*command, "--set", "workers.dtype=bfloat16", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["weights together (MiB)"] == 11
    both = subprocess.run([*command, "--model", "builtin:shapes"], capture_output=True, text=True, check=False)
    assert both.returncode == 2
    assert "--job asks about a job as it is; leave --model, --variant, --component and --fetch out" in both.stderr
