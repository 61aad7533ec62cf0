"""Caches of a given length, filled with random keys and values in the place of a prefill's.

What attention does with them costs the same whatever they are, and so a context of 8k tokens costs no 8k-token prefill
to reach.

Shapes: B sequences, K KV heads, C context, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gqa_convert.errors import UnsupportedModelError
from gqa_convert.evaluate.cache_formats import quantised_cache
from gqa_convert.evaluate.decode.settings import QUANTISED
from gqa_convert.evaluate.models import decoder_inputs, encoder_output, has_encoder

Pairs = list[tuple[Tensor, Tensor]]


@torch.inference_mode()
def filled_cache(model: Any, *, kind: str, batch: int, context: int, room: int, source: int | None = None) -> Any:
    """Return a transformers cache that holds `context` random tokens per sequence, and room for more if static.

    Args:
        model: to decode with it.
        kind: of `gqa_convert.evaluate.decode.settings.CACHES`.
        batch: sequences.
        context: tokens of the decoder's own attention.
        room: further tokens that a static cache has room for.
        source: positions of the encoder's output, whose keys and values the cross-attention cache holds; None for a
            model without an encoder.

    Raises:
        UnsupportedModelError: if the model keeps anything but keys and values.
    """
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    own, cross = layer_pairs(model)
    config = model.get_decoder().config if has_encoder(model) else model.config
    cache: Any
    if kind in QUANTISED:
        cache = quantised_cache(kind)
    elif kind == "static":
        cache = StaticCache(config=config, max_cache_len=context + room)
    else:
        cache = DynamicCache(config=config)
    _fill(cache, own, batch, context)
    if source is None:
        return cache
    listening = _cross_cache(kind, len(cross), source)
    _fill(listening, cross, batch, source)
    return EncoderDecoderCache(cache, listening)


def _cross_cache(kind: str, layers: int, source: int) -> Any:
    """Return an empty cache that holds all of the encoder's output in every layer: no window slides over it."""
    from transformers import Cache, DynamicCache, StaticLayer

    if kind in QUANTISED:
        return quantised_cache(kind)
    return DynamicCache() if kind == "dynamic" else Cache(layers=[StaticLayer(source) for _ in range(layers)])


def _fill(cache: Any, pairs: Pairs, batch: int, length: int) -> None:
    generator = torch.Generator(pairs[0][0].device).manual_seed(0)
    for index, pair in enumerate(pairs):
        keys, values = (
            torch.randn(batch, x.shape[1], 1, x.shape[3], dtype=x.dtype, device=x.device, generator=generator)
            for x in pair
        )
        cache.update(keys.expand(-1, -1, length, -1), values.expand(-1, -1, length, -1), index)


@torch.inference_mode()
def cross_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that cross-attention keeps for one position of the encoder's output; 0 without one.

    Raises:
        UnsupportedModelError: if the model keeps anything but keys and values.
    """
    if not has_encoder(model):
        return 0
    _, cross = layer_pairs(model)
    return sum(x.nbytes // x.shape[2] for pair in cross for x in pair)


def layer_pairs(model: Any) -> tuple[Pairs, Pairs]:
    """Keys and values of each layer for one sequence of two tokens, from a real forward pass: its own, and across."""
    ids = torch.full((1, 2), 3, dtype=torch.long, device=next(model.parameters()).device)
    if not has_encoder(model):
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
        return _pairs(model, getattr(cache, "layers", ())), []
    try:
        output = model(**decoder_inputs(ids, encoder_output(model, 1, 2)), use_cache=True)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{type(model).__name__}: its decoder does not run on token ids and an encoder's output alone ({why})."
        ) from error
    both = [getattr(output.past_key_values, f"{part}_attention_cache", None) for part in ("self", "cross")]
    own, cross = (_pairs(model, getattr(cache, "layers", ())) for cache in both)
    return own, cross


def _pairs(model: Any, layers: Sequence[Any]) -> Pairs:
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not pairs or not all(isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 4 for k, v in pairs):
        raise UnsupportedModelError(f"{type(model).__name__}: its cache is not keys and values in every layer.")
    return [(k, v) for k, v in pairs if k is not None and v is not None]
