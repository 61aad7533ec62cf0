"""GPTBigCode as a target: GPT-2's blocks with multi-query attention or with all heads, nothing between."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling.transpile.configs import common
from gqa_convert.modeling.transpile.rule import Part, Source
from gqa_convert.modeling.transpile.tensors import joined_per_head, ones, zeros

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "GPTBigCodeForCausalLM"
ONLY_GROUPS = (1,)


def bigcode_config(source: Source, *, positions: int, inner: int | None, act: str, **others: Any) -> dict[str, Any]:
    """config.json of the GPTBigCode model with all heads."""
    config = source.config
    return {
        **common(source, model_type="gpt_bigcode", architecture=CLASS),
        "n_positions": positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": inner,
        "activation_function": act,
        "multi_query": False,
        "num_key_value_heads": config.num_attention_heads,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "add_cross_attention": False,
        **others,
    }


def attention_rows(q: Tensor, k: Tensor, v: Tensor, heads: int, query_scale: float = 1.0) -> Tensor:
    """The rows of `c_attn`, [q k v] for each head; queries may take up a scale of the scores."""
    return joined_per_head(q if query_scale == 1.0 else q.double() * query_scale, k, v, heads)


def constant(key: str, size: int, like: str, value: int) -> Part:
    """A bias of zeros or a norm's scale of ones that the source does without."""
    return Part(key=key, like=like, shape=(size,), make=partial(ones if value else zeros, size))
