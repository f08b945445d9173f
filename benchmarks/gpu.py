"""On one accelerator: jobs beside plain diffusers, beside the arithmetic's floor, and what the exact profile costs.

    python benchmarks/gpu.py [--quick] [--cases sd15,sdxl,sdxl-4,flux,flux-4] [--rounds 5] [--tflops 790] [--folder FOLDER] [--json FILE]
    python benchmarks/gpu.py --tiny 1      # the same code with toy models on a CPU: says that it runs, and nothing else

No download: weights are random, of the sizes that the published configurations below give; speed does not depend on what they are. Models
are written once (SD 1.5: 2 GB, SDXL: 7 GB, FLUX.1-dev: 34 GB in bfloat16; `--folder` keeps them). The inline engine: no Ray is needed.

For each case: plain diffusers at growing batches until a larger one gains less than 3 %; then, at the best of these, in turns:

defaults     `pipe(prompt=[…], generator=[…])` with torch's defaults, saving PNGs
free         with cudnn.benchmark, TF32 and no determinism asked for
exact        the same loop with every flag that a job sets, and the autoencoder image by image
job          `renderfarm.run`: from the worker's readiness to the last part's commit

Then what may help, one after the other on top of `exact`: channels_last, fused projections, `compile_repeated_blocks`, the last also with
CUDA graphs. After each, a batch's first picture is compared with the same row's beside other mates and in the last place: differing bytes.

`of the floor` is the measured speed over `--tflops` divided by the counted floating-point operations of an image (denoiser and autoencoder;
texts are not counted). 790 is the dense bfloat16 rate that was assumed for an H200.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from loop import timed_run, write_job
from measuring import Child, Report, Round, column, compared, options, ratios, serve, spread, take_turns

from renderfarm.models.load import prepare_libraries

BATCHES = (1, 2, 4, 8, 16, 32)
WORTH_IT = 1.03


@dataclass(frozen=True)
class Case:
    """`tflop`: of an image, as counted on the published modules."""

    model: str
    side: int
    steps: int
    guidance: float
    sampler: str
    tflop: float


CASES = {
    "sd15": Case("sd15", 512, 20, 7.5, "euler", 34.6),
    "sdxl": Case("sdxl", 1024, 20, 5.0, "euler", 281),
    "sdxl-4": Case("sdxl", 1024, 4, 1.0, "euler", 37.5),
    "flux": Case("flux", 1024, 28, 3.5, "flow-euler", 2093),
    "flux-4": Case("flux", 1024, 4, 3.5, "flow-euler", 308),
}

# ------------------------------------------------------------------------------------------------ published configurations

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
FULL: dict[str, dict[str, Any]] = {
    "sd15": {
        "clip": CLIP_L,
        "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        "denoiser": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},  # the others are the class's own
    },
    "sdxl": {
        "clip": CLIP_L,
        "clip_2": CLIP_G,
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False},  # as the fixed autoencoder for 16 bits
        "denoiser": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    },
    "flux": {
        "clip": CLIP_L,
        "t5": T5_XXL,
        "vae": VAE
        | {"sample_size": 1024, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
        | {"use_quant_conv": False, "use_post_quant_conv": False},
        "denoiser": {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
    },
}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 32}
TINY_VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TINY_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
TINY: dict[str, dict[str, Any]] = {
    "sd15": {
        "clip": TINY_CLIP,
        "vae": FULL["sd15"]["vae"] | TINY_VAE,
        "denoiser": FULL["sd15"]["denoiser"] | TINY_UNET | {"cross_attention_dim": 32},
    },
    "sdxl": {
        "clip": TINY_CLIP,
        "clip_2": TINY_CLIP,
        "vae": FULL["sdxl"]["vae"] | TINY_VAE,
        "denoiser": FULL["sdxl"]["denoiser"]
        | TINY_UNET
        | {
            "cross_attention_dim": 64,
            "transformer_layers_per_block": 1,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 224,
        },
    },
    "flux": {
        "clip": TINY_CLIP,
        "t5": T5_XXL | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "vae": FULL["flux"]["vae"] | TINY_VAE | {"latent_channels": 4},
        "denoiser": FULL["flux"]["denoiser"]
        | {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        | {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
    },
}
LETTERS = [chr(code) for code in range(33, 127)]


def build(folder: Path, model: str, tiny: bool) -> None:
    """Write a model in diffusers' format, with random weights in bfloat16."""
    prepare_libraries()
    import diffusers
    import torch
    import transformers

    said = (TINY if tiny else FULL)[model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = {"bos_token_id": 2 * len(LETTERS), "eos_token_id": 2 * len(LETTERS) + 1, "pad_token_id": 2 * len(LETTERS) + 1}

    def clip(kind: Any, name: str) -> Any:
        config = transformers.CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **said[name], **ids)
        return random_weights(lambda: kind(config), device)

    vae = random_weights(lambda: diffusers.AutoencoderKL(**said["vae"]), device)
    first = clip(transformers.CLIPTextModel, "clip")
    pipe: Any
    if model == "flux":
        t5 = transformers.T5Config(**said["t5"], is_encoder_decoder=False, dropout_rate=0.0)
        pipe = diffusers.FluxPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            *(vae, first, clip_tokenizer(), random_weights(lambda: transformers.T5EncoderModel(t5), device), t5_tokenizer()),
            random_weights(lambda: diffusers.FluxTransformer2DModel(**said["denoiser"]), device),
        )
    else:
        unet = random_weights(lambda: diffusers.UNet2DConditionModel(**said["denoiser"]), device)
        if model == "sdxl":
            pipe = diffusers.StableDiffusionXLPipeline(
                *(vae, first, clip(transformers.CLIPTextModelWithProjection, "clip_2"), clip_tokenizer(), clip_tokenizer(), unet),
                diffusers.EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="leading"),
                add_watermarker=False,
            )
        else:
            pipe = diffusers.StableDiffusionPipeline(
                *(
                    vae,
                    first,
                    clip_tokenizer(),
                    unet,
                    diffusers.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True, set_alpha_to_one=False),
                ),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    partly = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partly, ignore_errors=True)
    pipe.save_pretrained(partly, safe_serialization=True)
    partly.rename(folder)


def random_weights(make: Callable[[], Any], device: str) -> Any:
    """Made without data first, since drawing 12 billion numbers as a class's own initialisation does takes minutes."""
    import torch

    with torch.device("meta"):
        module = make().to(torch.bfloat16)
    module = module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weights in module.named_parameters():
            if weights.ndim > 1:
                weights.normal_(0, weights[0].numel() ** -0.5, generator=generator)
            else:
                weights.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


def clip_tokenizer() -> Any:
    import transformers

    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={piece: k for k, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


# ------------------------------------------------------------------------------------------------ what is asked


def main() -> None:
    given = options(
        str(__doc__).splitlines()[0],
        cases=(str, ("sd15,sdxl,sdxl-4,flux,flux-4", "sd15,sdxl"), "which ones"),
        rounds=(int, (5, 5), "that count"),
        batches=(int, 4, "that each variant renders in a round"),
        tflops=(float, 790.0, "the device's dense rate in bfloat16"),
        improve=(str, "channels_last,fused,compiled,graphs", "what to try on top of `exact`"),
        batch=(int, 1, "of a child"),
        tiny=(int, 0, "1: toy models on a CPU"),
        folder=(Path, None, "where models are written and stay; a temporary folder otherwise"),
    )
    if given.child:
        begun = CHILDREN[given.child](given)
        serve(begun, begun.named() if isinstance(begun, Plain) else None)
        return
    report = Report(given)
    with tempfile.TemporaryDirectory(prefix="rf-gpu-") as name:
        given.folder = given.folder or Path(name)
        given.folder.mkdir(exist_ok=True)
        for case in given.cases.split(","):
            measure(given, report, case)
    report.end()


def child(given: argparse.Namespace, kind: str, case: str, *more: str) -> Child:
    tiny = ["--tiny", str(given.tiny), "--batches", str(given.batches), "--folder", str(given.folder)]
    return Child("gpu.py", "--child", kind, "--cases", case, *tiny, *more)


def measure(given: argparse.Namespace, report: Report, name: str) -> None:
    case = CASES[name]
    folder = given.folder / f"{case.model}{'-tiny' * given.tiny}"
    if not folder.is_dir():
        child(given, "build", name).close()
    plain = child(given, "plain", name)
    report.value.setdefault("devices", []).append(plain.said)
    best = best_batch(plain, 4 if given.tiny else BATCHES[-1])
    job = child(given, "job", name, "--batch", str(best))
    variants = {mode: (lambda _, mode=mode: plain.ask(f"{mode} {best}")) for mode in ("defaults", "free", "exact")}  # type: ignore[misc]
    found = take_turns({**variants, "job": job.ask}, given.rounds)
    floor = given.tflops / case.tflop
    lines = []
    for line, rounds in zip(compared(found, "job", "images_per_second"), found.values(), strict=True):
        lines.append([*line, f"{statistics.median(column(rounds, 'images_per_second')) / floor:.1%}"])
    what = f"{name}: {case.side}², {case.steps} steps, guidance {case.guidance:g}, B={best}, bfloat16, {plain.said['device']}"
    what = f"{name}, toy model: says nothing of speed" if given.tiny else what
    report.show(what, ["", "images/s", "`job` / it", "not below (95 %)", "of the floor"], lines, rounds=found)
    cost = [1 - one for one in ratios(found["exact"], found["free"], "images_per_second")]
    print(f"\nthe exact flags cost {statistics.median(cost):.1%} of the free ones' speed ({min(cost):.1%} to {max(cost):.1%})")
    improve(given, report, plain, best)
    for one in (plain, job):
        one.close()


def best_batch(plain: Child, most: int) -> int:
    best, rate = 1, 0.0
    for batch in (batch for batch in BATCHES if batch <= most):
        plain.ask(f"defaults {batch}")  # kernels of this shape are chosen once
        found = plain.ask(f"defaults {batch}").get("images_per_second", 0.0)
        print(f"  B={batch}: {found:.3f} images/s", flush=True)
        if found < rate * WORTH_IT:
            break
        best, rate = batch, found
    return best


def improve(given: argparse.Namespace, report: Report, plain: Child, batch: int) -> None:
    """Each on top of those before it: what it gains, and whether a row still has the same pixels whatever its mates are."""
    lines = []
    before = ""
    for mode in ["exact", *filter(None, given.improve.split(","))]:
        try:
            plain.ask(f"{mode} {batch}")
            seen = [plain.ask(f"{mode} {batch}") for _ in range(max(1, given.rounds))]
            bytes_ = plain.ask(f"mates:{mode} {batch}")["differing_bytes"]
        except SystemExit as error:  # a mode that this machine does not have is a line, too
            lines.append([mode, str(error)[:80], "", ""])
            break
        speed = [one["images_per_second"] for one in seen]
        lines.append([mode, spread(speed), before and f"{statistics.median(speed) / float(before):.3f}", bytes_])
        before = before or str(statistics.median(speed))
    report.show("On top of `exact`, not in turns", ["", "images/s", "to `exact`", "differing bytes"], lines)


# ------------------------------------------------------------------------------------------------ children


def case_of(given: argparse.Namespace) -> tuple[Case, Path, str]:
    """The case, its model's folder, the dtype."""
    case = CASES[given.cases]
    if given.tiny:
        case = replace(case, side=32, steps=2)
    return case, given.folder / f"{case.model}{'-tiny' * given.tiny}", "float32" if given.tiny else "bfloat16"


def built(given: argparse.Namespace) -> Callable[[str], Round]:
    case, folder, _ = case_of(given)
    build(folder, case.model, bool(given.tiny))
    return lambda line: {}


class Plain:
    """diffusers as its users call it, with one set of flags or another."""

    def __init__(self, given: argparse.Namespace) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the context is made; in every mode alike
        prepare_libraries()
        import diffusers
        import torch

        self.case, folder, self.dtype = case_of(given)
        self.batches = given.batches
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, self.dtype), local_files_only=True).to(
            self.device
        )
        self.pipe.set_progress_bar_config(disable=True)
        if self.case.sampler == "euler":
            self.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.folder = Path(tempfile.mkdtemp(prefix="rf-gpu-plain-"))
        self.done: set[str] = set()

    def named(self) -> Round:
        import torch

        return {"device": torch.cuda.get_device_name() if self.device == "cuda" else "CPU", "cuda": torch.version.cuda}

    def __call__(self, line: str) -> Round:
        mode, batch = line.split()
        mates = mode.startswith("mates:")
        self._set(mode.removeprefix("mates:"))
        if mates:
            return {"differing_bytes": self._differing(int(batch))}
        return self._timed(int(batch))

    def _set(self, mode: str) -> None:
        import torch

        from renderfarm.config import Workers
        from renderfarm.models.torch_setup import prepare_torch

        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.benchmark = mode == "free"
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            backend.fp32_precision = "tf32" if mode == "free" else "ieee"
        slices = mode not in ("defaults", "free")
        getattr(self.pipe.vae, "enable_slicing" if slices else "disable_slicing")()
        if slices:
            prepare_torch(Workers(dtype=self.dtype, device="auto"))
        if mode in self.done:
            return
        self.done.add(mode)
        denoiser = getattr(self.pipe, "transformer", None) or self.pipe.unet
        if mode == "channels_last":
            for module in (denoiser, self.pipe.vae):
                module.to(memory_format=torch.channels_last)
        elif mode == "fused":
            denoiser.fuse_qkv_projections()
        elif mode == "compiled":
            denoiser.compile_repeated_blocks(fullgraph=True)
        elif mode == "graphs":
            torch._dynamo.reset()
            denoiser.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")

    def _draw(self, prompts: list[str], seeds: list[int]) -> Any:
        import torch

        return self.pipe(
            prompt=prompts,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=self.case.steps,
            guidance_scale=self.case.guidance,
            height=self.case.side,
            width=self.case.side,
        ).images

    def _timed(self, batch: int) -> Round:
        import torch

        began = time.perf_counter()
        try:
            for number in range(self.batches):
                rows = range(number * batch, (number + 1) * batch)
                for row, picture in zip(rows, self._draw([f"a large red circle {row}" for row in rows], list(rows)), strict=True):
                    picture.save(self.folder / f"{row}.png", compress_level=1)  # the job's; Pillow's own takes twice as long
        except torch.OutOfMemoryError:
            return {}
        seconds = time.perf_counter() - began
        most = torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0.0
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the job is the next on this device, and has a pipeline of its own there
        return {"images_per_second": batch * self.batches / seconds, "memory_gb": most}

    def _differing(self, batch: int) -> int:
        """Of the first row's picture: beside others, and in the last place."""
        import numpy as np

        def picture(prompts: list[str], seeds: list[int], place: int) -> Any:
            return np.asarray(self._draw(prompts, seeds)[place], np.int16)

        prompts, seeds = [f"a large red circle {row}" for row in range(batch)], list(range(batch))
        first = picture(prompts, seeds, 0)
        others = picture([prompts[0], *(f"a small blue square {row}" for row in range(1, batch))], [0, *range(100, 99 + batch)], 0)
        last = picture([*prompts[1:], prompts[0]], [*seeds[1:], 0], batch - 1)
        return int((first != others).sum() + (first != last).sum())


def plain(given: argparse.Namespace) -> Callable[[str], Round]:
    return Plain(given)


def job(given: argparse.Namespace) -> Callable[[str], Round]:
    from renderfarm.jobfile import load_job

    case, model, dtype = case_of(given)
    folder = Path(tempfile.mkdtemp(prefix="rf-gpu-job-"))
    images = given.batch * given.batches
    rows = {"prompt": [f"a large red circle {row}" for row in range(images)], "seed": list(range(images))}
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    said = {
        "version": 1,
        "name": "gpu",
        "manifest": str(folder / "rows.parquet"),
        "model": str(model),
        "render": {
            "height": case.side,
            "width": case.side,
            "num_inference_steps": case.steps,
            "guidance_scale": case.guidance,
            "sampler": case.sampler,
        },
        "workers": {"max": 1, "batch_size": given.batch, "dtype": dtype},
        "output": {"path": str(folder / "out"), "part_rows": 2 * given.batch},
    }
    file = write_job(folder / "job.yaml", said)

    def work(_: str) -> Round:
        shutil.rmtree(folder / "out", ignore_errors=True)
        return timed_run(load_job(file), "inline")

    return work


CHILDREN: dict[str, Callable[[argparse.Namespace], Callable[[str], Round]]] = {"build": built, "plain": plain, "job": job}


if __name__ == "__main__":
    main()
