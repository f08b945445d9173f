"""What several families do in the same way: the first noise, counting tokens, pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from renderfarm.errors import NonFiniteOutput
from renderfarm.records import Sample


def initial_noise(sample: Sample, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Generator]:
    """The sample's first noise, drawn on the CPU, and the generator that its sampler goes on drawing from.

    With `blend`, a point on the great circle between the noises of `seed` and `seed_b`: both ends are those noises, bit
    for bit, and what is drawn later comes from the generator of the nearer end.
    """
    first = _draw(sample.seed, shape, device, dtype)
    if sample.seed_b is None or sample.blend is None:
        return first
    second = _draw(sample.seed_b, shape, device, dtype)
    generator = first[1] if sample.blend < 0.5 else second[1]
    return slerp(first[0], second[0], sample.blend), generator


def generator_of(seed: int) -> torch.Generator:
    """On the CPU, whatever renders: its numbers are the same everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def _draw(seed: int, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Generator]:
    generator = generator_of(seed)
    return randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype), generator


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985): a mean of two noises would be too weak, a point on the arc between them is not."""
    if t in (0.0, 1.0):
        return b if t else a
    x, y = a.cpu().double(), b.cpu().double()  # on the CPU, as they were drawn; not all devices have doubles
    cosine = (x * y).sum() / (x.norm() * y.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.abs() < 1e-3:
        return torch.lerp(x, y, t).to(a)
    return ((torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)).to(a)


def count_tokens(tokenizer: Any, prompt: str, length: int) -> tuple[int, str | None]:
    """Tokens of the whole prompt, and the exact end of it that does not fit in `length` tokens."""
    encoded = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    count = len(encoded.input_ids)
    if count <= length:
        return count, None
    truncated = tokenizer(prompt, truncation=True, max_length=length, verbose=False).input_ids
    kept = length - (truncated[-1] in tokenizer.all_special_ids)  # most, but not Gemma's, end in a mark
    if not tokenizer.is_fast:
        return count, str(tokenizer.decode(encoded.input_ids[kept:-1]))
    return count, prompt[encoded.offset_mapping[kept][0] :]


def count_texts(texts: Sequence[str], readers: Sequence[tuple[Any, int]]) -> tuple[int, str | None]:
    """Tokens of the first text, and the end that no encoder sees of that or of another one.

    `readers`: tokenizer and length of each encoder, in the order of the texts. An encoder with room for the whole of a text
    makes good for one that cuts it off.
    """
    longest: dict[str, tuple[Any, int]] = {}
    for text, reader in zip(texts, readers, strict=False):
        longest[text] = max(longest.get(text, reader), reader, key=lambda reader: reader[1])
    counted = [count_tokens(tokenizer, text, length) for text, (tokenizer, length) in longest.items()]
    return counted[0][0], next((cut_off for _, cut_off in counted if cut_off is not None), None)


def count_in_template(tokenizer: Any, template: Callable[[str], str], prompt: str, length: int) -> tuple[int, str | None]:
    """Tokens of the prompt where `template` puts it into a longer text, and its exact end that does not fit in `length`."""
    mark = "\ue000"
    start = template(mark).index(mark)
    offsets = tokenizer(template(prompt), truncation=False, verbose=False, return_offsets_mapping=True).offset_mapping
    stop = start + len(prompt)
    count = sum(first < stop and last > start for first, last in offsets)
    if len(offsets) <= length or offsets[length][0] >= stop:
        return count, None
    return count, prompt[max(offsets[length][0] - start, 0) :]


LANES = 32  # of the widest vector register: bfloat16 in AVX-512


def fills_vectors(encoder: torch.nn.Module) -> bool:
    """Whether every layer's width is a whole number of vectors, as in all published encoders.

    If not, the last numbers of a batch are left over from its last vector, and torch computes their activations by
    other instructions: an embedding would depend on its place in the batch.
    """
    return all(layer.out_features % LANES == 0 for layer in encoder.modules() if isinstance(layer, torch.nn.Linear))


NOT_FINITE = "the model gave NaN or infinite values; try workers.dtype: float32 or bfloat16, or another sampler or guidance_scale"


def finite_pixels(image_13HW: torch.Tensor, image_processor: Any) -> np.ndarray:
    """H×W×3 uint8, by the pipeline's own rounding. Raises NonFiniteOutput rather than paint NaN as black."""
    if not torch.isfinite(image_13HW).all():
        raise NonFiniteOutput(NOT_FINITE)
    return to_uint8(image_processor.postprocess(image_13HW, output_type="np")[0])


def to_uint8(picture_HW3: np.ndarray) -> np.ndarray:
    """Floats 0..1 as diffusers' `numpy_to_pil` rounds them."""
    return np.ascontiguousarray((picture_HW3 * 255).round().astype("uint8"))
