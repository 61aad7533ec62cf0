"""What GPT-NeoX with a sequential residual has in common on its ways to StarCoder2 and to Nemotron."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gqa_convert.modeling.transpile.rule import Part, Source, copy
from gqa_convert.modeling.transpile.tensors import per_head, rows


def rotary_size(config: Any) -> int:
    """How many of a head's values GPT-NeoX turns, as transformers computes it."""
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return int(config.hidden_size // config.num_attention_heads * share)


def turns_whole_heads(config: Any) -> bool:
    """Whether all of a head is rotary (`rotary_pct: 1.0`)."""
    return bool(rotary_size(config) == config.hidden_size // config.num_attention_heads)


def sizes(config: Any) -> dict[str, Any]:
    """The fields that the source and both targets have in common, by the targets' names."""
    kept = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"]
    kept += ["max_position_embeddings", "attention_dropout"]
    return {name: getattr(config, name) for name in kept} | {"num_key_value_heads": config.num_attention_heads}


def attention_and_mlp(source: Source, to: str, of: str, up: str, down: str) -> Iterable[Part]:
    """The tensors of a layer but for its norms: q, k and v out of the fused projection, the others renamed.

    Args:
        source: the checkpoint.
        to: the target's layer, with a projection `o_proj`.
        of: the source's layer.
        up: what the target calls the MLP's first linear layer.
        down: what it calls the second.
    """
    width, heads = source.config.hidden_size, source.config.num_attention_heads
    attention = f"{of}.attention"
    for kind in ("weight", "bias") if source.config.attention_bias else ("weight",):
        shape = (width, width) if kind == "weight" else (width,)
        for which, name in enumerate(("q_proj", "k_proj", "v_proj")):
            yield Part(
                key=f"{to}.self_attn.{name}.{kind}",
                sources=(f"{attention}.query_key_value.{kind}",),
                shape=shape,
                make=rows(per_head, heads, which),
            )
        yield copy(f"{to}.self_attn.o_proj.{kind}", f"{attention}.dense.{kind}")
    for kind in ("weight", "bias"):
        yield copy(f"{to}.mlp.{up}.{kind}", f"{of}.mlp.dense_h_to_4h.{kind}")
        yield copy(f"{to}.mlp.{down}.{kind}", f"{of}.mlp.dense_4h_to_h.{kind}")
