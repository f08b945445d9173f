"""A tiny pipeline of every family, with random weights, built from configuration classes: no network, milliseconds an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

WORDS = [chr(code) for code in range(33, 127)]


def clip_tokenizer() -> Any:
    """Letters, and letters that end a word; `!` pads as in SDXL's second tokenizer no more than in the first."""
    pieces = [*WORDS, *(f"{word}</w>" for word in WORDS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={piece: k for k, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((word, -2.0) for word in WORDS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def clip(projection: bool, width: int = 64) -> Any:
    size = len(WORDS) * 2 + 2
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=32, intermediate_size=width, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1, projection_dim=32,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config) if projection else transformers.CLIPTextModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=len(WORDS) + 4, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, is_encoder_decoder=False
    )
    return transformers.T5EncoderModel(config)


def vae(channels: int = 4, **changes: Any) -> AutoencoderKL:
    config: dict[str, Any] = {
        "block_out_channels": (32, 32),
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": channels,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "sample_size": 32,
    }
    return AutoencoderKL(**config | changes)


def unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**config | changes)


SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion(width: int = 64, **unet_changes: Any) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae(), clip(False, width), clip_tokenizer(), unet(**unet_changes), diffusers.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def odd_width() -> diffusers.StableDiffusionPipeline:
    """Its CLIP's layers are no whole number of vector registers wide."""
    return stable_diffusion(37)


def guidance_embedded() -> diffusers.StableDiffusionPipeline:
    return stable_diffusion(time_cond_proj_dim=32)


def safety_checker(flags: bool) -> Any:
    """Flags every picture, or none: no cosine is above 2, all are above -2."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=16))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    return checker


def checked(flags: bool) -> diffusers.StableDiffusionPipeline:
    pipe = stable_diffusion()
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return diffusers.StableDiffusionPipeline(**{**pipe.components, "safety_checker": safety_checker(flags), "feature_extractor": extractor})


def latent_consistency() -> diffusers.LatentConsistencyModelPipeline:
    return diffusers.LatentConsistencyModelPipeline(
        vae(), clip(False), clip_tokenizer(), unet(time_cond_proj_dim=32), diffusers.LCMScheduler(**SCALED_LINEAR),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(force_zeros: bool = True, **vae_changes: Any) -> diffusers.StableDiffusionXLPipeline:
    conditioned = unet(
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=32,
        transformer_layers_per_block=1, projection_class_embeddings_input_dim=32 * 6 + 32, use_linear_projection=True,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae(**vae_changes), clip(False), clip(True), clip_tokenizer(), clip_tokenizer(), conditioned,
        diffusers.EulerDiscreteScheduler(**SCALED_LINEAR), force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_xl_plain() -> diffusers.StableDiffusionXLPipeline:
    """As fine-tuned models differ: negative embeddings of an empty text, latents with a mean and a deviation of their own."""
    return stable_diffusion_xl(False, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.0, 1.2])


def stable_diffusion_3(t5_encoder: bool = True, **scheduler: Any) -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16, pos_embed_max_size=24,
    )  # fmt: skip
    encoder = t5() if t5_encoder else None
    if encoder is not None:
        encoder = transformers.T5EncoderModel(transformers.T5Config(**{**encoder.config.to_diff_dict(), "d_model": 64}))
    return diffusers.StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(**scheduler or {"shift": 3.0}),
        vae(16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        clip(True), clip_tokenizer(), clip(True), clip_tokenizer(), encoder, t5_tokenizer() if t5_encoder else None,
    )  # fmt: skip


def stable_diffusion_3_dynamic() -> diffusers.StableDiffusion3Pipeline:
    """Without T5, and with a shift that follows the size."""
    return stable_diffusion_3(False, shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256)


def flux(guidance_embeds: bool, **scheduler: Any) -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(**scheduler),
        vae(4, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False),
        clip(False), clip_tokenizer(), t5(), t5_tokenizer(), transformer,
    )  # fmt: skip


def flux_dev() -> diffusers.FluxPipeline:
    return flux(True, shift=3.0, use_dynamic_shifting=True)


def flux_schnell() -> diffusers.FluxPipeline:
    return flux(False, shift=1.0)


def controlnet(denoiser: UNet2DConditionModel) -> diffusers.ControlNetModel:
    """With a UNet's own shape, as they are trained."""
    return diffusers.ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(16, 32), load_weights_from_unet=False)


def sd_controlnet() -> diffusers.ControlNetModel:
    return controlnet(stable_diffusion().unet)


def sdxl_controlnet() -> diffusers.ControlNetModel:
    return controlnet(stable_diffusion_xl().unet)


def sdxl_refiner() -> diffusers.StableDiffusionXLImg2ImgPipeline:
    """One text encoder, the second; and a score for looks among its conditions."""
    conditioned = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=32,
        transformer_layers_per_block=1, projection_class_embeddings_input_dim=32 * 5 + 32, use_linear_projection=True,
    )  # fmt: skip
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae(), None, clip(True), None, clip_tokenizer(), conditioned, diffusers.EulerDiscreteScheduler(**SCALED_LINEAR),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd-odd-width": odd_width,
    "sd-guidance-embedded": guidance_embedded,
    "lcm": latent_consistency,
    "sdxl": stable_diffusion_xl,
    "sdxl-plain": stable_diffusion_xl_plain,
    "sd3": stable_diffusion_3,
    "sd3-dynamic": stable_diffusion_3_dynamic,
    "flux-dev": flux_dev,
    "flux-schnell": flux_schnell,
    # what is used beside one of these
    "sd-controlnet": sd_controlnet,
    "sdxl-controlnet": sdxl_controlnet,
    "sdxl-refiner": sdxl_refiner,
}


def save(pipe: Any, folder: Path) -> Path:
    """Random weights of a seed, drawn wide enough that texts and sizes show in the pixels."""
    generator = torch.Generator().manual_seed(0)
    parts = {"": pipe} if isinstance(pipe, torch.nn.Module) else pipe.components
    modules = [part for name, part in sorted(parts.items()) if isinstance(part, torch.nn.Module) and name != "safety_checker"]
    with torch.no_grad():
        for weights in (parameter for part in modules for parameter in part.parameters()):
            if weights.ndim > 1:
                fan_in = weights[0].numel()
                weights.copy_(torch.randn(weights.shape, generator=generator) / fan_in**0.5)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def build(builder: Callable[[], Any], folder: Path) -> Path:
    """The folder of that family's model, built on first use."""
    if folder.exists():
        return folder
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save(builder(), folder)
