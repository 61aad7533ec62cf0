"""GPT-2 as GPTBigCode, whose blocks are GPT-2's with linear layers the other way round and multi-query attention."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling.transpile import bigcode
from gqa_convert.modeling.transpile.rule import Part, Rule, Source, copy, register

if TYPE_CHECKING:
    from torch import Tensor

_LINEAR = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def _config(source: Source) -> dict[str, Any]:
    config = source.config
    return bigcode.bigcode_config(
        source,
        positions=config.n_positions,
        inner=config.n_inner,
        act=config.activation_function,
        layer_norm_epsilon=config.layer_norm_epsilon,
        scale_attn_weights=config.scale_attn_weights,
        resid_pdrop=config.resid_pdrop,
        embd_pdrop=config.embd_pdrop,
        attn_pdrop=config.attn_pdrop,
    )


def _parts(source: Source) -> Iterable[Part]:
    for name in ("wte", "wpe"):
        yield copy(f"transformer.{name}.weight", f"transformer.{name}.weight")
    for layer in range(source.config.n_layer):
        yield from _layer(source, f"transformer.h.{layer}", layer)
    for kind in ("weight", "bias"):
        yield copy(f"transformer.ln_f.{kind}", f"transformer.ln_f.{kind}")
    if "lm_head.weight" in source.infos:
        yield copy("lm_head.weight", "lm_head.weight")


def _layer(source: Source, path: str, layer: int) -> Iterable[Part]:
    config = source.config
    for norm in ("ln_1", "ln_2"):
        for kind in ("weight", "bias"):
            yield copy(f"{path}.{norm}.{kind}", f"{path}.{norm}.{kind}")
    inverse = 1.0 / (layer + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
    make = partial(_attention, heads=config.n_head, query_scale=inverse)
    for kind in ("weight", "bias"):
        name = f"{path}.attn.c_attn.{kind}"
        shape = (3 * config.n_embd, config.n_embd) if kind == "weight" else (3 * config.n_embd,)
        yield Part(key=name, sources=(name,), shape=shape, make=make)
    for module in _LINEAR:
        name = f"{path}.{module}.weight"
        yield Part(key=name, sources=(name,), shape=source.info(name).shape[::-1], make=_turned)
        yield copy(f"{path}.{module}.bias", f"{path}.{module}.bias")


def _attention(fused: Tensor, *, heads: int, query_scale: float) -> Tensor:
    """Columns [q | k | v] of a Conv1D (or such a bias) as rows of a linear layer, head by head."""
    q, k, v = (fused.T if fused.dim() == 2 else fused).chunk(3)
    return bigcode.attention_rows(q, k, v, heads, query_scale)


def _turned(weight: Tensor) -> Tensor:
    return weight.T


def _refusal(config: Any) -> str | None:
    return (
        "it has cross-attention, which GPTBigCode has not beside multi-query attention"
        if (config.add_cross_attention)
        else None
    )


def _notes(config: Any) -> tuple[str, ...]:
    if not config.scale_attn_by_inverse_layer_idx:
        return ()
    return ("queries take up the scale of scores by layer, which rounds them where weights are in half precision",)


register(
    Rule(
        name="gpt2",
        sources=("gpt2", "gpt-sw3"),
        source_class="GPT2LMHeadModel",
        target="gpt_bigcode",
        target_class=bigcode.CLASS,
        why="its blocks are GPT-2's, with linear layers stored the other way round, and it knows multi-query attention",
        refusal=_refusal,
        config=_config,
        parts=_parts,
        only_groups=bigcode.ONLY_GROUPS,
        notes=_notes,
    )
)
