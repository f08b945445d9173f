"""What a model is, read without loading it; and how it is found."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from oracle import CLASSES, row
from safetensors.numpy import load_file, save_file

import renderfarm
from renderfarm.config import ModelSpec, Workers
from renderfarm.errors import Fatal, Filtered, InvalidInput, InvalidJob
from renderfarm.jobfile import load_job
from renderfarm.models import catalog
from renderfarm.models.about import about
from renderfarm.models.catalog import describe
from renderfarm.models.families import FAMILIES, compared, families_markdown
from renderfarm.models.files import components
from renderfarm.models.load import load_model
from renderfarm.plan import Grid, leases
from renderfarm.preparation import prepare
from renderfarm.samplers import find_sampler
from renderfarm.slots import SlotLoop

SHAPES = describe(ModelSpec(id="builtin:shapes"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(str(SHAPES.folder), tmp_path / "my-model"))


def test_the_embedded_model_says_its_size_and_defaults() -> None:
    assert (SHAPES.height, SHAPES.width, SHAPES.factor, SHAPES.num_inference_steps) == (64, 64, 8, 20)
    assert SHAPES.adapter == "stable_diffusion:StableDiffusion"


def test_the_embedded_model_is_small_and_only_safetensors() -> None:
    files = [path for path in Path(str(SHAPES.folder)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_a_folder_is_a_model_and_tables_show_its_name_not_its_place(copy: Path) -> None:
    info = describe(ModelSpec(id=str(copy)))
    assert (info.name, info.sampler) == ("my-model", SHAPES.sampler)


def test_a_scheduler_that_the_model_comes_with_is_its_default_sampler(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    for scheduler, sampler in (
        ("PNDMScheduler", "pndm"),
        ("DPMSolverMultistepScheduler", "dpm++2m"),
        ("SomethingElse", "ddim"),
    ):
        index["scheduler"] = ["diffusers", scheduler]
        (copy / "model_index.json").write_text(json.dumps(index))
        assert describe(ModelSpec(id=str(copy))).sampler == sampler


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", ["diffusers", "UNet2DConditionModel"]),
        ("../unet", ["diffusers", "UNet2DConditionModel"]),
        ("/etc", ["diffusers", "UNet2DConditionModel"]),
        ("unet/inner", ["diffusers", "UNet2DConditionModel"]),
        (".", ["diffusers", "UNet2DConditionModel"]),
        ("unet", ["diffusers", 5]),
        ("unet", ["diffusers", None]),
        ("unet", ["diffusers", "../UNet2DConditionModel"]),
        ("unet", ["diffusers", ""]),
        ("unet", ["..", "UNet2DConditionModel"]),
        ("unet", ["", "UNet2DConditionModel"]),
    ],
)
def test_an_index_whose_words_are_no_names_is_refused(name: str, value: list[Any], copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    with pytest.raises(InvalidJob, match=re.escape(f"model_index.json is damaged: {name!r}: {value} is no component's name")):
        components({**index, name: value})
    (copy / "model_index.json").write_text(json.dumps({**index, name: value}))
    with pytest.raises(InvalidJob, match=rf"^model {copy}: its model_index\.json is damaged: .*; fetch the model again$"):
        describe(ModelSpec(id=str(copy)))


def test_other_values_in_an_index_are_settings() -> None:
    settings: dict[str, Any] = {
        "a": None,
        "b": [],
        "c": "x",
        "d": [1, 2],
        "e": [None, None],
        "f": [1, 2, 3],
        "g": {},
        "_h": ["x", 5],
        "_": 1,
    }
    assert components(settings | {"vae": ["diffusers", "AutoencoderKL"]}) == {"vae": ("diffusers", "AutoencoderKL")}


@pytest.mark.parametrize("value", [None, [], "", 7, {}])
@pytest.mark.parametrize("name", ["scheduler", "text_encoder_3", "feature_extractor"])
def test_a_part_that_an_index_does_not_name_as_one_is_absent(name: str, value: Any, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, name: value}))
    assert describe(ModelSpec(id=str(copy))).sampler == ("ddim" if name == "scheduler" else SHAPES.sampler)
    with pytest.raises(InvalidJob, match="it has no safety checker"):
        describe(ModelSpec(id=str(copy), safety_checker=True))


@pytest.mark.parametrize("text", ["[]", "5", "null", '"unet"', "{"])
def test_an_index_that_is_no_object_is_no_model(text: str, copy: Path) -> None:
    (copy / "model_index.json").write_text(text)
    with pytest.raises(InvalidJob, match=r"is not a model in diffusers' format \(model_index\.json\)"):
        describe(ModelSpec(id=str(copy)))


NO_TEXT_TO_IMAGE = (
    *("StableDiffusionImg2ImgPipeline", "AudioLDMPipeline", "SanaVideoPipeline", "CogVideoXFunControlPipeline"),
    *("WuerstchenPriorPipeline", "StableDiffusionGLIGENPipeline"),
)


@pytest.mark.parametrize("class_name", [*NO_TEXT_TO_IMAGE, "NoSuchPipeline", "UNet2DConditionModel", 7])
def test_a_class_that_a_prompt_alone_cannot_call_is_refused_by_name(class_name: Any, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name}))
    with pytest.raises(
        InvalidJob, match=r"is no text-to-image class of diffusers .*; supported and compared: StableDiffusionPipeline, .*FluxPipeline"
    ):
        describe(ModelSpec(id=str(copy)))


def test_a_pinned_hub_model_is_found_in_the_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub/models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    shutil.move(copy, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    info = describe(ModelSpec(id="org/name", revision=COMMIT))
    assert (info.name, info.revision) == ("org/name", COMMIT)
    assert str(info.folder).endswith(COMMIT)


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_a_hub_model_without_its_full_commit_is_refused(revision: str | None) -> None:
    with pytest.raises(InvalidJob, match="full commit"):
        describe(ModelSpec(id="org/name", revision=revision))


def test_the_profile_names_weights_versions_and_flags() -> None:
    profile = load_model(SHAPES, Workers(batch_size=2)).profile()
    assert profile["deterministic_algorithms"] is True
    assert len(profile["weights"]["vae/diffusion_pytorch_model.safetensors"]) == 64
    assert {
        "torch",
        "diffusers",
        "transformers",
        "tokenizers",
        "numpy",
        "scipy",
        "threads",
        "cpu_capability",
        "dtype",
        "text_length",
    } <= set(profile)


def test_a_lease_carries_its_own_rows_only(write_manifest: Callable[..., Path], write_job: Callable[..., Path]) -> None:
    manifest = write_manifest({"prompt": ["x" * 1000] * 1000})
    prepared = prepare(load_job(write_job(manifest)))
    first = next(leases(prepared.manifest, Grid(1000, 4), lambda index: False))
    assert len(pickle.dumps(first)) < 20_000


def test_the_profile_is_the_same_in_processes_with_other_hash_seeds(copy: Path) -> None:
    """diffusers notes defaults of a short scheduler configuration in hash order; that must not reach the profile."""
    config = copy / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.012}))
    script = (
        "import json; from renderfarm.config import ModelSpec, Workers\n"
        "from renderfarm.models.catalog import describe; from renderfarm.models.load import load_model\n"
        f"print(json.dumps(load_model(describe(ModelSpec(id={str(copy)!r})), Workers()).profile(), sort_keys=True))\n"
    )
    profiles = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    }
    assert len(profiles) == 1


def change(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.fixture
def own(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model that a test may change."""
    return lambda name: Path(shutil.copytree(tiny_model(name), tmp_path / name))


# height, factor, largest side, steps, guidance, sampler
FACTS = {
    "sd": (32, 8, 128, 50, 7.5, "pndm"),
    "lcm": (32, 8, 128, 4, 8.5, "lcm"),
    "sdxl": (32, 8, 128, 50, 5.0, "euler"),
    "sd3": (32, 4, 96, 28, 7.0, "flow-euler"),
    "flux-dev": (256, 4, 1024, 28, 3.5, "flow-euler"),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_family_says_its_sizes_and_its_pipelines_defaults_without_torch(name: str, tiny_model: Callable[[str], Path]) -> None:
    info = describe(ModelSpec(id=str(tiny_model(name))))
    assert (info.height, info.factor, info.max_side, info.num_inference_steps, info.guidance_scale, info.sampler) == FACTS[name]
    assert info.width == info.height
    script = (
        f"import sys; from renderfarm.models.catalog import describe; from renderfarm.config import ModelSpec; "
        f"describe(ModelSpec(id={info.folder!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_published_sd3_or_flux_folder_gives_the_sizes_that_people_know(own: Callable[[str], Path]) -> None:
    blocks = [128, 256, 512, 512]
    sd3 = change(own("sd3"), "transformer/config.json", sample_size=128, pos_embed_max_size=192)
    flux = own("flux-dev")
    for folder in (sd3, flux):
        info = describe(ModelSpec(id=str(change(folder, "vae/config.json", block_out_channels=blocks))))
        assert (info.height, info.width, info.factor) == (1024, 1024, 16)
        assert info.max_side == (3072 if folder == sd3 else 4096)


def test_a_unet_of_an_oblong_sample_size_is_painted_oblong(own: Callable[[str], Path]) -> None:
    info = describe(ModelSpec(id=str(change(own("sd"), "unet/config.json", sample_size=[16, 24]))))
    assert (info.height, info.width, info.max_side) == (32, 48, 192)


@pytest.mark.parametrize(
    ("name", "taken", "not_taken"),
    [
        ("sd", {"negative_prompt"}, {"prompt_2", "true_cfg_scale"}),
        ("sd-guidance-embedded", set(), {"negative_prompt"}),
        ("lcm", set(), {"negative_prompt"}),
        ("sdxl", {"negative_prompt", "prompt_2", "negative_prompt_2"}, {"prompt_3", "true_cfg_scale"}),
        ("sd3", {"prompt_3", "negative_prompt_3"}, {"true_cfg_scale"}),
        ("sd3-dynamic", {"prompt_2", "negative_prompt_2"}, {"prompt_3", "negative_prompt_3"}),
        ("flux-dev", {"true_cfg_scale", "prompt_2", "negative_prompt_2"}, {"prompt_3"}),
    ],
)
def test_arguments_that_a_model_would_ignore_are_not_taken(
    name: str, taken: set[str], not_taken: set[str], tiny_model: Callable[[str], Path]
) -> None:
    arguments = describe(ModelSpec(id=str(tiny_model(name)))).arguments
    assert taken <= arguments
    assert not arguments & not_taken


def test_a_latent_consistency_model_without_a_guidance_embedding_is_refused(own: Callable[[str], Path]) -> None:
    folder = change(own("lcm"), "unet/config.json", time_cond_proj_dim=None)
    with pytest.raises(InvalidJob, match="takes no guidance embedding"):
        describe(ModelSpec(id=str(folder)))


@pytest.mark.parametrize(
    ("name", "sampler", "reason", "near"),
    [
        ("lcm", "Euler a", "cannot render this model: .*only its own sampler follows", "lcm"),
        ("lcm", "tcd", "only its own sampler follows", "lcm"),
        ("lcm", "flow-euler", "for flow models", "lcm"),
        ("sd3", "Euler a", "for diffusion models, and this is a flow model", "flow-euler"),
        ("sd3", "lcm", "for diffusion models", "flow-"),
        ("flux-dev", "ddim", "for diffusion models", "flow-"),
        ("flux-dev", "flow-lcm", "global random state", "flow-euler"),
        ("flux-schnell", "flow_dpmpp_2m", "exponential dynamic shifting only", "flow-"),
        ("sdxl", "flow-euler", "for flow models", "euler"),
    ],
)
def test_a_sampler_that_a_model_cannot_use_is_refused_with_the_reason_and_a_legal_one(
    name: str, sampler: str, reason: str, near: str, tiny_model: Callable[[str], Path]
) -> None:
    info = describe(ModelSpec(id=str(tiny_model(name))))
    with pytest.raises(InvalidInput, match=reason) as caught:
        find_sampler(sampler, info.kind, info.refused_samplers)
    named = str(caught.value).rpartition(" ")[2].strip("'")
    assert named.startswith(near)
    assert find_sampler(named, info.kind, info.refused_samplers).name == named


EDM = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


@pytest.mark.parametrize(
    ("name", "class_name", "options", "trained"),
    [
        ("sdxl", "EDMDPMSolverMultistepScheduler", EDM, "EDM"),
        ("sd", "EDMEulerScheduler", EDM, "EDM"),
        ("sdxl", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow"),
        ("sdxl", "FlowMatchHeunDiscreteScheduler", {}, "flow"),
        ("sd", "DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "flow"),
        ("sd", "SCMScheduler", {}, "TrigFlow"),
        ("sd3", "EulerDiscreteScheduler", {}, "diffusion"),
        ("sd3", "DPMSolverMultistepScheduler", {"use_flow_sigmas": False}, "diffusion"),
        ("flux-dev", "SASolverScheduler", {}, "diffusion"),
        ("flux-dev", "EDMEulerScheduler", EDM, "EDM"),
    ],
)
@pytest.mark.parametrize("where", ["both files", "scheduler_config.json"])
def test_a_model_that_was_trained_for_another_kind_of_sampler_is_refused(
    name: str, class_name: str, options: dict[str, Any], trained: str, where: str, own: Callable[[str], Path]
) -> None:
    folder = own(name)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": class_name, **options}))
    if where == "both files":
        change(folder, "model_index.json", scheduler=["diffusers", class_name])
    with pytest.raises(InvalidJob, match=rf"its scheduler {class_name}, .* is for {trained} models.*choose another model"):
        describe(ModelSpec(id=str(folder)))


@pytest.mark.parametrize(
    ("name", "class_name", "options", "sampler"),
    [
        ("sd", "SASolverScheduler", {"algorithm_type": "data_prediction"}, "ddim"),
        ("sd", "DPMSolverSDEScheduler", {"use_karras_sigmas": True}, "ddim"),
        ("sdxl", "IPNDMScheduler", {}, "ddim"),
        ("sdxl", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, "dpm++2m-sde-karras"),
        ("sdxl", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpm++2m-karras"),
        ("sdxl", "EulerDiscreteScheduler", {"use_beta_sigmas": True}, "euler"),
        ("sd3", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "flow-unipc"),
        ("sd3", "DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}, "flow-dpm++2m"),
        ("flux-dev", "FlowMatchHeunDiscreteScheduler", {}, "flow-euler"),
        ("flux-dev", "SomethingElse", {}, "flow-euler"),
    ],
)
def test_the_default_sampler_is_what_the_models_own_configuration_says(
    name: str, class_name: str, options: dict[str, Any], sampler: str, own: Callable[[str], Path]
) -> None:
    folder = change(own(name), "model_index.json", scheduler=["diffusers", class_name])
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": class_name, **options}))
    assert describe(ModelSpec(id=str(folder))).sampler == sampler


def test_a_model_without_any_legal_sampler_is_refused_in_words(
    own: Callable[[str], Path], write_manifest: Callable[..., Path], write_job: Callable[..., Path]
) -> None:
    folder = change(own("z-image"), "scheduler/scheduler_config.json", stochastic_sampling=True)
    with pytest.raises(InvalidJob, match=r"stochastic_sampling.*; no other one can render it either"):
        prepare(load_job(write_job(write_manifest(), model=str(folder))))


def test_a_scheduler_that_draws_from_the_global_random_state_is_refused(
    own: Callable[[str], Path], write_manifest: Callable[..., Path], write_job: Callable[..., Path]
) -> None:
    folder = change(own("sd3"), "scheduler/scheduler_config.json", stochastic_sampling=True)
    job = write_job(write_manifest(), model=str(folder))
    with pytest.raises(InvalidJob, match=r"flow-euler cannot render this model: .*stochastic_sampling.*global random state.*use 'flow-"):
        prepare(load_job(job))
    prepare(load_job(job, ["render.sampler=flow-unipc"]))


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_the_solver_that_takes_only_exponential_shifts_is_refused_for_linear_ones(own: Callable[[str], Path], time_shift_type: str) -> None:
    folder = change(own("sd3-dynamic"), "scheduler/scheduler_config.json", time_shift_type=time_shift_type)
    assert set(describe(ModelSpec(id=str(folder))).refused_samplers) == ({"flow-dpm++2m"} if time_shift_type == "linear" else set())


@pytest.mark.parametrize("flags", [False, True])
def test_an_image_that_the_safety_checker_refuses_is_an_error_and_others_are_as_without_it(flags: bool, tmp_path: Path) -> None:
    folder = families.save(families.checked(flags), tmp_path / "checked")
    images = []
    for asked in (False, True):
        loop = SlotLoop(lambda asked=asked: load_model(describe(ModelSpec(id=str(folder), safety_checker=asked)), Workers(batch_size=2)))  # type: ignore[misc]
        try:
            profile = loop.ready.result().profile()
            assert profile["safety_checker"] is asked
            future = loop.submit([row(sampler="euler")])[0]
            if flags and asked:
                with pytest.raises(Filtered, match="refused this image; give the row another prompt or seed"):
                    future.result(timeout=60)
            else:
                images.append(future.result(timeout=60).pixels)
        finally:
            loop.close()
    for image in images:
        np.testing.assert_array_equal(image, images[0])


@pytest.mark.parametrize("name", ["builtin:shapes", "builtin:fake", "sd", "flux-dev"])
def test_asking_for_a_safety_checker_that_is_not_there_is_refused(name: str, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidJob, match="has no safety checker"):
        describe(ModelSpec(id=name if ":" in name else str(tiny_model(name)), safety_checker=True))


def test_the_table_of_families_is_the_codes_and_each_family_in_it_was_compared_with_diffusers() -> None:
    text = (Path(catalog.__file__).parent / "FAMILIES.md").read_text()
    assert families_markdown() in text, "write it again with `renderfarm models --markdown`"
    assert {kind.__name__ for kind in CLASSES.values()} == set(FAMILIES)


def test_the_record_of_comparisons_is_of_the_versions_that_are_tested() -> None:
    """Of other ones nothing is known: `make record` compares again."""
    (cpu,) = compared()
    pins = dict(line.split("==") for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "diffusers", "transformers"):
        assert cpu[name] == pins[name] == version(name).partition("+")[0]
    tasks = {how.pipeline_class for family in FAMILIES.values() for how in family.tasks.values()}
    assert set(FAMILIES) | tasks <= set(cpu["comparisons"])


def test_what_is_known_of_a_model_is_told_without_loading_it(copy: Path) -> None:
    found = about(ModelSpec(id=str(copy)))
    assert (found["class"], found["default size"]) == ("StableDiffusionPipeline", "64 high, 64 wide; multiples of 8, at most 256")
    assert "image-to-image" in found["tasks"]
    hashes = {
        path.relative_to(copy).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in copy.rglob("*") if path.is_file()
    }
    assert found["sha256"] == hashlib.sha256("".join(f"{path} {hashes[path]}\n" for path in sorted(hashes)).encode()).hexdigest()
    numbers = sum(tensor.size for path in copy.rglob("*.safetensors") for tensor in load_file(path).values())
    assert f"float32 {numbers * 4 / 2**20:,.0f} MiB" in found["weights in memory"]
    largest = sum(tensor.size for tensor in load_file(copy / "unet/diffusion_pytorch_model.safetensors").values())
    assert f"float32 {largest * 4 / 2**20:,.0f} MiB" in found["with workers.offload: model"]


def test_a_flipped_byte_in_a_weight_file_stops_the_job_before_it_renders(
    copy: Path, write_manifest: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = about(ModelSpec(id=str(copy)))["sha256"]
    path = write_job(write_manifest(), model={"id": str(copy), "sha256": wanted}, render={"num_inference_steps": 1})
    assert renderfarm.run(path, engine="inline").images == 8
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Fatal, match=rf"the job asks for {wanted} \(model\.sha256\): a file was changed, damaged"):
        renderfarm.run(load_job(path, out=str(tmp_path / "again")), engine="inline")
    assert not list((tmp_path / "again").glob("data/**/*.png"))


LACKING = {
    "text_encoder": ("model", "encoder.layers.0.self_attn.q_proj.weight", "CLIPTextModel"),
    "unet": ("diffusion_pytorch_model", "down_blocks.0.resnets.0.conv1.weight", "unet"),
    "vae": ("diffusion_pytorch_model", "decoder.conv_in.weight", "vae"),
}


@pytest.mark.parametrize("part", LACKING)
def test_a_weight_that_a_file_lacks_stops_the_job_and_is_not_drawn_at_random(
    part: str, copy: Path, write_manifest: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path
) -> None:
    """diffusers' own pipeline loads such a text encoder, and paints something else in each process."""
    file, lacking, shown = LACKING[part]
    path = copy / part / f"{file}.safetensors"
    tensors = load_file(path)
    del tensors[lacking]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Fatal, match=re.escape(f"lacks weights ({shown}: {lacking}); is it the whole model? Fetch it again")):
        renderfarm.run(write_job(write_manifest(), model=str(copy)), engine="inline")
    assert not list(tmp_path.glob("out/data/**/*.png"))


def test_a_weight_file_that_is_cut_off_says_so(copy: Path, write_manifest: Callable[..., Path], write_job: Callable[..., Path]) -> None:
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Fatal, match=r"cannot be loaded from .*; is a file damaged, or cut off\? Fetch it again"):
        renderfarm.run(write_job(write_manifest(), model=str(copy)), engine="inline")
