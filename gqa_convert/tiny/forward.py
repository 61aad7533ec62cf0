"""Forward passes of a tiny model: all at once, and step by step through its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gqa_convert.tiny.unusual import UNUSUAL

if TYPE_CHECKING:
    from torch import Tensor

# `generate` gives these what their bare forward pass leaves out: the positions of a step, the cache to fill.
NEEDS_POSITIONS = ("bamba",)
NEEDS_CACHE = ("granite4_vision", "recurrent_gemma")

PREFILL = 7  # positions of the first cached call; the rest follow one by one


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of one forward pass without cache, (batch, length, ..., vocabulary)."""
    import torch

    with torch.no_grad():
        if model.config.model_type in UNUSUAL:
            return UNUSUAL[model.config.model_type].full(model, inputs)
        return _logits_of(speaker(model)(**_arguments(inputs), use_cache=False))


def cached_logits(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Return the logits at every position, computed by prefill and single steps with a cache, and that cache.

    The cache is the one the model makes for itself, or a `DynamicCache` where it takes one but returns none.
    """
    import torch

    if model.config.model_type in UNUSUAL:
        with torch.no_grad():
            return UNUSUAL[model.config.model_type].cached(model, inputs)
    decoded = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    length = inputs[decoded].shape[1]
    model = speaker(model)
    cache = _own_cache(model) if model.config.model_type in NEEDS_CACHE else None
    pieces, encoded = [], None
    with torch.no_grad():
        for start, stop in [(0, PREFILL), *((i, i + 1) for i in range(PREFILL, length))]:
            piece = dict(inputs)
            for name in (decoded, "token_type_ids"):
                if name in piece:
                    piece[name] = piece[name][:, start:stop]
            if model.config.model_type in NEEDS_POSITIONS:
                piece["position_ids"] = torch.arange(start, stop)[None]
            arguments = _arguments(piece)
            if encoded is not None:
                arguments["encoder_outputs"] = encoded
            output = model(**arguments, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", cache)
            encoded = _encoder_outputs(output, arguments, decoded)
            pieces.append(_logits_of(output))
    return torch.cat(pieces, dim=1), cache


def speaker(model: Any) -> Any:
    """Return the part of `model` that maps text to logits: the model itself, or the one its `generate` calls."""
    return getattr(model, "thinker", model)


def _own_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _arguments(inputs: dict[str, Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(inputs)
    if "encoder_hidden" in arguments:
        from transformers.modeling_outputs import BaseModelOutput

        encoded = BaseModelOutput(last_hidden_state=arguments.pop("encoder_hidden"))
        encoded.attention_mask = None  # speech encoders shorten their mask and return it
        encoded.router_logits = None
        arguments["encoder_outputs"] = encoded
    return arguments


def _encoder_outputs(output: Any, arguments: dict[str, Any], decoded: str) -> Any:
    if decoded == "input_ids" or "encoder_outputs" in arguments:
        return arguments.get("encoder_outputs")
    from transformers.modeling_outputs import BaseModelOutput

    encoded = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
    encoded.attention_mask = encoded.router_logits = None  # which some families look for
    return encoded


def _logits_of(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def cache_head_counts(cache: Any) -> list[int]:
    """Return the number of heads each cache layer holds, self-attention first, then cross-attention.

    Layers without keys (state-space layers, layers that read another layer's keys) are left out.
    """
    from transformers import EncoderDecoderCache

    if cache is None:
        return []
    if isinstance(cache, EncoderDecoderCache):
        return cache_head_counts(cache.self_attention_cache) + cache_head_counts(cache.cross_attention_cache)
    counts = []
    for layer in getattr(cache, "layers", ()):
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        heads = [int(states.shape[1]) for states in held if states is not None and states.dim() == 4]
        if heads:
            counts.append(max(heads))
    return counts


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two results, relative to the larger of their scales."""
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    return float((a - b).abs().max()) / scale
