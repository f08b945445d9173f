"""Train `builtin:shapes` from scratch: tokenizer, autoencoder, text encoder and UNet, on drawn scenes.

    python -m renderfarm.shapes.train --work /tmp/shapes --out renderfarm/shapes/model
    python -m renderfarm.shapes.train --work /tmp/shapes --out renderfarm/shapes/model --start renderfarm/shapes/model

The second form goes on from a finished model with the last cycle and the decoder.

Each stage leaves a file in the work folder and is skipped when that file is there, so an interrupted training goes
on. Two to three hours on two CPU cores with AVX-512 bf16 that do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from renderfarm.shapes.scenes import RELATIONS, SIZE_PX, caption, draw, random_scene

TEXT_LENGTH = 77
# Stable Diffusion's own schedule never hides a plain background: at its last timestep sqrt(alpha_bar) is 0.068, and the
# mean of 16×16 latents shows it through the noise, so the model reads it there and not from the text. The other one
# ends in noise (0.006), and the model predicts v, which at that end is the picture itself.
EPSILON = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
VELOCITY = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction"}


@dataclass(frozen=True)
class Cycle:
    """Steps under one noise schedule, with a learning rate that rises to `max_lr` and falls to nothing.

    `careful`: scenes that add little to a mean squared error come oftener (`scene_weights`), and so do the timesteps at
    which noise hides the picture in part (`draw_timesteps`).
    """

    noise: dict[str, Any]
    steps: int
    max_lr: float
    careful: bool = False


# One after the other. Shapes learnt with the first schedule serve for the second, so a training anew could leave the first
# cycle out. The shipped weights went through one more cycle before the last (see the model card).
CYCLES = (Cycle(EPSILON, 7000, 1.2e-3), Cycle(VELOCITY, 1800, 8e-4), Cycle(VELOCITY, 6000, 5e-4, careful=True))


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learnt from captions: every word of a caption is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    rng = Random(0)
    bpe.train_from_iterator((caption(random_scene(rng)) for _ in range(20_000)), trainer)

    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def make_vae() -> AutoencoderKL:
    """64×64×3 pixels → 4×16×16 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        scaling_factor=1.0,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids, B×77."""
    encoded = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids


def bf16() -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def draw_pool(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """`count` pictures as uint8 N×3×64×64, and their captions."""
    rng = Random(seed)
    pixels = np.empty((count, 3, SIZE_PX, SIZE_PX), dtype=np.uint8)
    captions = []
    for index in range(count):
        scene = random_scene(rng)
        pixels[index] = np.asarray(draw(scene)).transpose(2, 0, 1)
        captions.append(caption(scene, rng))
    return torch.from_numpy(pixels), captions


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 → float −1..1."""
    return pixels.float() / 127.5 - 1


def train_vae(vae: AutoencoderKL, pixels: torch.Tensor, steps: int, batch: int = 16) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.1)
    generator, start = torch.Generator().manual_seed(1), time.time()
    for step in range(steps):
        x = to_model(pixels[torch.randint(len(pixels), (batch,), generator=generator)])
        with bf16():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample
        y = y.float()
        kl = posterior.kl().float().mean() / (4 * 16 * 16)
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vae {step} loss {loss.item():.4f} l1 {F.l1_loss(y, x).item():.4f} {time.time() - start:.0f}s", flush=True)


def tune_decoder(vae: AutoencoderKL, pixels: torch.Tensor, latents: torch.Tensor, captions: list[str], steps: int, batch: int = 16) -> None:
    """Go on with the decoder alone, on the latents that the UNet was trained on: small shapes come out sharper.

    A little noise stands for what the UNet gets wrong, and differences between neighbours count, since edges make shapes.
    """
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    generator, start, weights = torch.Generator().manual_seed(3), time.time(), scene_weights(latents, captions)
    for step in range(steps):
        pick = torch.multinomial(weights, batch, generator=generator)
        x, z = to_model(pixels[pick]), latents[pick]
        with bf16():
            y = vae.decode(z + 0.05 * torch.randn(z.shape, generator=generator)).sample
        y = y.float()
        edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + edges
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"decoder {step + 1} loss {loss.item():.4f} {time.time() - start:.0f}s", flush=True)
    vae.requires_grad_(True)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latent means, N×4×16×16 in fp16."""
    means = []
    for chunk in torch.split(pixels, 64):
        means.append(vae.encode(to_model(chunk)).latent_dist.mean.half())
    return torch.cat(means)


def scene_weights(latents: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """How often each of N scenes is drawn, relative to others: the fainter or smaller its objects, the oftener, and scenes
    of one object oftener than those of two.

    A small yellow star on orange adds next to nothing to a mean squared error, and a model that leaves it out is hardly
    ever corrected. What a caption's pictures look like does not change by this, only how often the caption comes.
    """
    background = latents.flatten(2).median(dim=-1).values[..., None, None]
    energy = ((latents - background) ** 2).mean(dim=(1, 2, 3)) - 0.05  # a plain background has 0.05
    energy = energy.clamp(min=1e-3)
    faint = (energy.median() / energy).sqrt().clamp(0.5, 4.0)
    single = torch.tensor([not any(f" {relation} " in caption for relation in RELATIONS) for caption in captions])
    return faint * torch.where(single, 1.3, 1.0)


def draw_timesteps(count: int, careful: bool, generator: torch.Generator) -> torch.Tensor:
    """Timesteps 0..999, uniform; `careful`: half of them logit-normal, as in Stable Diffusion 3
    (https://arxiv.org/abs/2403.03206, section 3.1), with the middle moved towards noise, where colour and place are decided.
    """
    uniform = torch.rand(count, generator=generator)
    middle = torch.sigmoid(0.5 + torch.randn(count, generator=generator))
    chosen = torch.where(torch.rand(count, generator=generator) < 0.5, middle, uniform) if careful else uniform
    return (chosen * 1000).long().clamp(max=999)


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    latents: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    empty: torch.Tensor,
    checkpoint: Path,
    cycle: Cycle,
    batch: int = 32,
) -> None:
    """A tenth of the captions is dropped for guidance; the averaged weights are left in the models."""
    noise_schedule = DDPMScheduler(num_train_timesteps=1000, **cycle.noise)
    # The backward pass of fused attention is slow on CPUs. (torch.compile would be faster still, and wrong: of a UNet
    # compiled under bfloat16 autocast, torch 2.13 gives gradients on a CPU that have little to do with the true ones.)
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    live = torch.nn.ModuleList([unet, text_encoder])
    average = copy.deepcopy(live)
    optimizer = torch.optim.AdamW(live.parameters(), lr=cycle.max_lr, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=cycle.max_lr, total_steps=cycle.steps, pct_start=0.03)
    generator, start, first, losses = torch.Generator().manual_seed(2), time.time(), 0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved["step"]
        for part, key in ((live, "live"), (average, "average"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(saved[key])
        generator.manual_seed(2 + first)
    for step in range(first, cycle.steps):
        pick = torch.multinomial(weights, batch, generator=generator)
        x, ids = latents[pick].float(), tokens[pick].clone()
        ids[torch.rand(batch, generator=generator) < 0.1] = empty
        noise = torch.randn(x.shape, generator=generator)
        t = draw_timesteps(batch, cycle.careful, generator)
        with bf16():
            text = text_encoder(ids)[0]
            predicted = unet(noise_schedule.add_noise(x, noise, t), t, text, return_dict=False)[0]
        wanted = noise if cycle.noise["prediction_type"] == "epsilon" else noise_schedule.get_velocity(x, noise, t)
        loss = F.mse_loss(predicted.float(), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)
        if step % 100 == 99:
            rate = (time.time() - start) / (step + 1 - first)
            print(f"unet {step + 1} loss {np.mean(losses[-100:]):.4f} {rate:.3f}s/step", flush=True)
        if step % 500 == 499:
            parts: dict[str, Any] = {"live": live, "average": average, "optimizer": optimizer, "schedule": schedule}
            torch.save({"step": step + 1, **{k: p.state_dict() for k, p in parts.items()}}, f"{checkpoint}.new")
            Path(f"{checkpoint}.new").replace(checkpoint)
    live.load_state_dict(average.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' results")
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument("--start", type=Path, help="a finished model to go on from")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, help="steps of each cycle, for a trial (default: the cycle's own)")
    parser.add_argument("--pool", type=int, default=80_000, help="scenes drawn for the UNet")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer, vae = make_tokenizer(), make_vae().to(memory_format=torch.channels_last)
    text_encoder, unet, cycles = make_text_encoder(tokenizer), make_unet(), list(CYCLES)
    if args.start:
        finished = StableDiffusionPipeline.from_pretrained(args.start, dtype=torch.float32, safety_checker=None)
        for mine, its in ((vae, finished.vae), (text_encoder, finished.text_encoder), (unet, finished.unet)):
            mine.load_state_dict(its.state_dict())
        cycles = cycles[-1:]
    vae_file, pool_file = args.work / "vae.pt", args.work / "pool.pt"
    if not vae_file.exists():
        if not args.start:
            train_vae(vae, draw_pool(min(args.pool, 12_000), seed=1)[0], args.vae_steps)
        torch.save(vae.state_dict(), vae_file)
    vae.load_state_dict(torch.load(vae_file, weights_only=True))
    pixels, captions = draw_pool(args.pool, seed=2)
    if not pool_file.exists():
        torch.save({"latents": encode_pool(vae, pixels), "captions": captions}, pool_file)
    pool = torch.load(pool_file, weights_only=True)
    scale = 1.0 / pool["latents"].float().std().item()
    vae.register_to_config(scaling_factor=scale)
    print(f"scaling factor {scale:.4f}", flush=True)

    unet.to(memory_format=torch.channels_last)
    tokens = tokenize(tokenizer, pool["captions"])
    empty = tokenize(tokenizer, [""])[0]
    latents = pool["latents"].float() * scale
    for number, cycle in enumerate(cycles, start=len(CYCLES) - len(cycles) + 1):
        weights = scene_weights(latents, pool["captions"]) if cycle.careful else torch.ones(len(latents))
        cycle = replace(cycle, steps=args.unet_steps or cycle.steps)
        train_unet(unet, text_encoder, latents, weights, tokens, empty, args.work / f"cycle{number}.pt", cycle)
    decoder_file = args.work / "decoder.pt"
    if not decoder_file.exists():
        tune_decoder(vae, pixels, pool["latents"].float(), pool["captions"], args.decoder_steps)
        torch.save(vae.state_dict(), decoder_file)
    vae.load_state_dict(torch.load(decoder_file, weights_only=True))
    # Euler does not clip, but DDPM and DDIM do unless they are told not to, and latents are not between -1 and 1
    options = {**VELOCITY, "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    scheduler = EulerDiscreteScheduler.from_config(options)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(args.out, safe_serialization=True)


if __name__ == "__main__":
    main()
