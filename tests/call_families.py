"""A tiny pipeline of every family that is rendered through its class's own call, with random weights, as in `families`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from families import WORDS, clip, clip_tokenizer, t5, t5_tokenizer, unet, vae
from tokenizers.pre_tokenizers import ByteLevel

NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)

MISTRAL_SPECIAL = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set name = 'INST' if message.role == 'user' else 'SYSTEM_PROMPT' %}"
    "[{{ name }}]{{ message.content[0].text }}[/{{ name }}]{% endfor %}"
)


def pieces(*special: str) -> dict[str, int]:
    """Letters, and bytes for whatever else a text holds."""
    return {piece: k for k, piece in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *WORDS])}


def qwen_tokenizer() -> Any:
    """Bytes: the 34 tokens that QwenImagePipeline drops are the first 34 of its template here, not all of its instruction."""
    vocab = {piece: k for k, piece in enumerate([*sorted(ByteLevel.alphabet()), *QWEN_SPECIAL])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=QWEN_SPECIAL[1:])
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def qwen3(layers: int) -> Any:
    return transformers.Qwen3Config(**NARROW, vocab_size=len(qwen_tokenizer()), num_hidden_layers=layers, tie_word_embeddings=True)


def mistral_processor() -> Any:
    """Not PixtralProcessor, as it needs torchvision; the call on texts is the same."""
    vocab = pieces("<unk>", "<s>", "</s>", "<pad>", *MISTRAL_SPECIAL)
    tokenizer = transformers.LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>", extra_special_tokens=MISTRAL_SPECIAL)
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=16)
    return transformers.LlavaProcessor(images, tokenizer, patch_size=16, chat_template=MISTRAL_TEMPLATE, image_token="[IMG]")


def mistral3(layers: int) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "head_dim": 16,
    }
    tokenizer = mistral_processor().tokenizer
    text = {**NARROW, "model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": layers, "sliding_window": None}
    config = transformers.Mistral3Config(
        vision_config={**vision, "model_type": "pixtral", "patch_size": 16},
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def sharp(transformer: Any) -> Any:
    """Its attention picks few tokens, so that a short text shows among much padding and a long instruction."""
    with torch.no_grad():
        for name, weights in transformer.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_k.weight")):
                weights.fill_(5.0)
    return transformer


def flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    """The text encoders' hidden layers are taken at three depths, side by side."""
    decoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=8, norm_num_groups=8, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=96,
        timestep_guidance_channels=32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return {"scheduler": scheduler, "vae": decoder, "transformer": sharp(transformer)}


def flux2_dev() -> diffusers.Flux2Pipeline:
    return diffusers.Flux2Pipeline(**flux2_parts(True), text_encoder=mistral3(31), tokenizer=mistral_processor())


def flux2_klein(distilled: bool = False) -> diffusers.Flux2KleinPipeline:
    encoder = transformers.Qwen3ForCausalLM(qwen3(28))
    return diffusers.Flux2KleinPipeline(**flux2_parts(False), text_encoder=encoder, tokenizer=qwen_tokenizer(), is_distilled=distilled)


def flux2_klein_distilled() -> diffusers.Flux2KleinPipeline:
    return flux2_klein(True)


def qwen_image() -> diffusers.QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    text = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": len(tokenizer), "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
        "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=32, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.0, 1.2],
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(
        scheduler, decoder, transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer, sharp(transformer)
    )


def z_image() -> diffusers.ZImagePipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=32, axes_dims=[8, 12, 12],
    )  # fmt: skip
    decoder = vae(4, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False)
    encoder = transformers.Qwen3Model(qwen3(3))
    return diffusers.ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), decoder, encoder, qwen_tokenizer(), transformer)


LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def pixart(kind: Any, scheduler: Any) -> Any:
    """Of the 256-pixel models' sample size: the class chooses the picture sizes that it rounds to by it."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32, num_layers=2, attention_head_dim=32, num_attention_heads=2, caption_channels=32, in_channels=4,
        cross_attention_dim=64, out_channels=8,
    )  # fmt: skip
    return kind(t5_tokenizer(), t5(), vae(), transformer, scheduler)


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    return pixart(diffusers.PixArtSigmaPipeline, diffusers.DPMSolverMultistepScheduler(**LINEAR))


def pixart_alpha() -> diffusers.PixArtAlphaPipeline:
    return pixart(diffusers.PixArtAlphaPipeline, diffusers.DPMSolverMultistepScheduler(**LINEAR))


def sana() -> diffusers.SanaPipeline:
    tokenizer = transformers.GemmaTokenizer(vocab=pieces("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), merges=[])
    config = transformers.Gemma2Config(**NARROW, vocab_size=len(tokenizer), num_hidden_layers=2, query_pre_attn_scalar=32)
    decoder = diffusers.AutoencoderDC(
        latent_channels=32, encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_layers=2, num_attention_heads=2, attention_head_dim=32, num_cross_attention_heads=2,
        cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32, mlp_ratio=2.0, sample_size=16,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return diffusers.SanaPipeline(tokenizer, transformers.Gemma2Model(config), decoder, transformer, scheduler)


def pixel_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 32, "layers_per_block": 1, "block_out_channels": (32, 64), "in_channels": 3, "out_channels": 6, "norm_num_groups": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "cross_attention_dim": 32, "encoder_hid_dim": 32,
        "attention_head_dim": 32, "addition_embed_type": "text", "addition_embed_type_num_heads": 2, "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu",
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**config | changes)


def pixel_scheduler() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )  # fmt: skip


def deepfloyd() -> diffusers.IFPipeline:
    """Draws pixels, not latents, and noise at every step."""
    return diffusers.IFPipeline(t5_tokenizer(), t5(), pixel_unet(), pixel_scheduler(), None, None, None, requires_safety_checker=False)


def deepfloyd_second() -> diffusers.IFSuperResolutionPipeline:
    """Twice as large as the first stage's pictures; as published, with a text encoder of its own that nobody needs."""
    denoiser = pixel_unet(sample_size=64, in_channels=6, class_embed_type="timestep", block_out_channels=(16, 32))
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return diffusers.IFSuperResolutionPipeline(
        t5_tokenizer(), t5(), denoiser, pixel_scheduler(), noising, None, None, None, requires_safety_checker=False
    )


def deepfloyd_third() -> diffusers.StableDiffusionUpscalePipeline:
    """Twice as large as the pictures that it is given, as its autoencoder is a shallow one."""
    schedulers = (
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(**LINEAR, prediction_type="v_prediction"),
    )
    denoiser = unet(in_channels=7, num_class_embeds=1000, block_out_channels=(16, 32))
    return diffusers.StableDiffusionUpscalePipeline(vae(scaling_factor=0.08333), clip(False), clip_tokenizer(), denoiser, *schedulers)


BUILDERS: dict[str, Callable[[], Any]] = {
    "flux2-dev": flux2_dev,
    "flux2-klein": flux2_klein,
    "flux2-klein-distilled": flux2_klein_distilled,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "pixart-sigma": pixart_sigma,
    "sana": sana,
    "deepfloyd": deepfloyd,
    "deepfloyd-second": deepfloyd_second,
    "deepfloyd-third": deepfloyd_third,
    "generic": pixart_alpha,
}
