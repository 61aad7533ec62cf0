"""Phi as a target: a parallel residual behind one LayerNorm, biases everywhere, partial rotary embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from gqa_convert.modeling.transpile.configs import common, rotary
from gqa_convert.modeling.transpile.rule import Part, Source, copy
from gqa_convert.modeling.transpile.tensors import zeros

CLASS = "PhiForCausalLM"


def phi_config(
    source: Source,
    *,
    intermediate: int,
    act: str,
    eps: float,
    rope: dict[str, Any],
    share: float,
    dropouts: tuple[float, float, float],
) -> dict[str, Any]:
    """config.json of the Phi model; `dropouts` are of the residual, the embedding and the attention."""
    config = source.config
    resid, embd, attention = dropouts
    return {
        **common(source, model_type="phi", architecture=CLASS),
        "hidden_size": config.hidden_size,
        "intermediate_size": intermediate,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": act,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": eps,
        "resid_pdrop": resid,
        "embd_pdrop": embd,
        "attention_dropout": attention,
        "qk_layernorm": False,
        **rotary(rope, share),
    }


def zero_bias(key: str, size: int, like: str) -> Part:
    """A bias that the target has and the source does without."""
    return Part(key=key, like=like, shape=(size,), make=partial(zeros, size))


def renamed(source: Source, pairs: Iterable[tuple[str, str]]) -> Iterable[Part]:
    """Weight and bias of modules (target's path, source's path), copied; a bias that is not stored is zero."""
    for target, origin in pairs:
        yield copy(f"{target}.weight", f"{origin}.weight")
        if f"{origin}.bias" in source.infos:
            yield copy(f"{target}.bias", f"{origin}.bias")
        else:
            size = source.info(f"{origin}.weight").shape[0]
            yield zero_bias(f"{target}.bias", size, f"{origin}.weight")


def head(source: Source, name: str, embedding: str) -> Iterable[Part]:
    """The language-model head: its weight where it is stored (else it is tied), its bias or zeros."""
    if f"{name}.weight" in source.infos:
        yield copy("lm_head.weight", f"{name}.weight")
    if f"{name}.bias" in source.infos:
        yield copy("lm_head.bias", f"{name}.bias")
    else:
        yield zero_bias("lm_head.bias", source.config.vocab_size, f"{embedding}.weight")
