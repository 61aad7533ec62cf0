"""What every target's config.json takes over from the source's, in spellings that old and new readers know."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from gqa_convert.modeling.transpile.rule import Source

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "tie_word_embeddings", "initializer_range")


def common(source: Source, *, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields that mean the same in every family: identity, vocabulary, token ids, dtype, tokenizer."""
    config, values = source.config, source.values
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
    }
    fields |= {name: getattr(config, name) for name in _KEPT if getattr(config, name, None) is not None}
    dtype = values.get("dtype") or values.get("torch_dtype")
    if dtype:
        fields |= {"dtype": dtype, "torch_dtype": dtype}
    tokenizer = values.get("tokenizer_class") or _tokenizer_class(str(values.get("model_type", config.model_type)))
    return fields | ({"tokenizer_class": tokenizer} if tokenizer else {})


def _tokenizer_class(model_type: str) -> str | None:
    """The tokenizer class that transformers picks by the source's model type, which the target no longer names."""
    module = importlib.import_module("transformers.models.auto.tokenization_auto")
    names = getattr(module, "TOKENIZER_MAPPING_NAMES", {})
    name = names.get(model_type)
    name = next((each for each in name if each), None) if isinstance(name, (tuple, list)) else name
    return name if isinstance(name, str) else None


def rotary(parameters: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The rotary fields, in the spelling of transformers 5 and in the one that all other readers know.

    Args:
        parameters: `rope_parameters` of the source: `rope_theta`, `rope_type` and what that type needs.
        factor: share of head_dim that is rotary.
    """
    own = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    own.setdefault("rope_type", "default")
    theta = parameters["rope_theta"]
    rope: dict[str, Any] = {
        "rope_theta": theta,
        "partial_rotary_factor": factor,
        "rope_parameters": {"rope_theta": theta, "partial_rotary_factor": factor, **own},
    }
    return rope if own["rope_type"] == "default" else rope | {"rope_scaling": own}


def rotary_share(rotary_dim: int, head_dim: int) -> float:
    """The share of head_dim from which `int(head_dim * share)`, as readers compute it, gives `rotary_dim` again."""
    share = rotary_dim / head_dim
    while int(head_dim * share) < rotary_dim:
        share = (rotary_dim + 0.5) / head_dim if share == rotary_dim / head_dim else share + 0.1 / head_dim
    return share
