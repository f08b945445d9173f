"""Weighted texts of any length, read in chunks by the library compel, for families whose texts are CLIP's.

    text ─▶ parts (BREAK) ─▶ chunks of L tokens ─▶ chunks·L×D, with chunks of the empty text behind where another text is longer

A text is encoded alone: its embedding depends on no other text, but for the number of chunks behind it, which is part
of what is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from renderfarm.errors import Fatal
from renderfarm.weighting import Part, parse, words

MARKS = 2  # in each chunk: of its beginning and end


class PaddedText(NamedTuple):
    """What is encoded: a text for each encoder, to an embedding of so many chunks."""

    texts: tuple[str, ...]
    chunks: int


class WeightedTexts:
    """A pipeline's one or two CLIPs, read by compel, with the adapters that are on when a text is encoded."""

    def __init__(self, pipe: Any) -> None:
        if importlib.util.find_spec("compel") is None:
            raise Fatal("render.prompt_weighting needs the package compel: pip install 'renderfarm[weights]'")
        second = getattr(pipe, "text_encoder_2", None)
        self._encoders = [(pipe.tokenizer, pipe.text_encoder), *([] if second is None else [(pipe.tokenizer_2, second)])]
        self._pooled = second is not None
        self._counting = self._providers()
        self._measured = lru_cache(4096)(self._measure)

    def profile(self) -> dict[str, str]:
        return {"syntax": "a1111", "long_texts": "sentences", "compel": version("compel")}

    def padded(self, texts: Iterable[Hashable]) -> tuple[PaddedText, ...]:
        """A sample's texts (a string, or one for each encoder), all to the length of the longest."""
        these = [self._for_encoders(text) for text in texts]
        chunks = max(self._measured(k, text)[0] for texts_of in these for k, text in enumerate(texts_of))
        return tuple(PaddedText(text, chunks) for text in these)

    def count(self, text: Hashable) -> int:
        """Tokens that the first encoder reads, with the marks of all chunks."""
        return self._measured(0, self._for_encoders(text)[0])[1]

    def encode(self, texts: Sequence[PaddedText]) -> list[tuple[torch.Tensor, ...]]:
        """chunks·L×D of each text, and where there are two encoders the second's pooled D'."""
        providers = self._providers()  # they keep the empty text's embedding, which adapters change
        return [self._encode(providers, *text) for text in texts]

    def _for_encoders(self, text: Any) -> tuple[str, ...]:
        texts: tuple[str, ...] = (text,) if isinstance(text, str) else text[: len(self._encoders)]
        return tuple(one or texts[0] for one in texts)  # an empty second text is the first, as for the pipeline

    def _measure(self, encoder: int, text: str) -> tuple[int, int]:
        """Chunks and tokens of a text."""
        provider, chunks, tokens = self._counting[encoder], 0, 0
        for part in parse(text):
            fragments, weights = _readable(provider, part)
            ids, _, _ = provider.get_token_ids_and_expand_weights(fragments, weights, device="cpu")
            chunks += len(ids) // provider.max_token_count
            tokens += sum(map(len, provider.get_token_ids(fragments, include_start_and_end_markers=False)))
        return chunks, tokens + MARKS * chunks

    def _encode(self, providers: Sequence[Any], texts: tuple[str, ...], chunks: int) -> tuple[torch.Tensor, ...]:
        read = [_embedding(provider, parse(text), chunks) for provider, text in zip(providers, texts, strict=True)]
        together = (torch.cat(read, dim=-1)[0],)
        if not self._pooled:
            return together
        # compel would pool the marks as words; as with diffusers, the pooled embedding is of the first L tokens
        return (*together, providers[-1].get_pooled_embeddings([words(parse(texts[-1]))])[0])

    def _providers(self) -> list[Any]:
        from compel import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode

        kind = "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED" if self._pooled else "LAST_HIDDEN_STATES_NORMALIZED"
        return [
            EmbeddingsProvider(
                tokenizer,
                encoder,
                truncate=False,
                returned_embeddings_type=ReturnedEmbeddingsType[kind],
                split_long_text_mode=SplitLongTextMode.SENTENCES,  # else phrases, else words
            )
            for tokenizer, encoder in self._encoders
        ]


def _embedding(provider: Any, parts: tuple[Part, ...], chunks: int) -> torch.Tensor:
    """1×chunks·L×D."""
    read = []
    for part in parts:
        fragments, weights = _readable(provider, part)
        read.append(provider.get_embeddings_for_weighted_prompt_fragments([fragments], [weights], device=provider.device))
    missing = chunks - sum(embedding.shape[1] for embedding in read) // provider.max_token_count
    return torch.cat([*read, *[provider.empty_z] * missing], dim=1)


def _readable(provider: Any, part: Part) -> tuple[list[str], list[float]]:
    """The fragments that have tokens: compel does not find the others, such as a blank, again."""
    texts = [fragment.text for fragment in part]
    tokens = provider.get_token_ids(texts, include_start_and_end_markers=False) if texts else []
    kept = [fragment for fragment, ids in zip(part, tokens, strict=True) if ids]
    return [fragment.text for fragment in kept] or [""], [fragment.weight for fragment in kept] or [1.0]
