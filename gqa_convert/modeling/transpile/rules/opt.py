"""OPT as GPTBigCode: learned positions, which OPT stores two rows down, LayerNorm before attention and MLP."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling.transpile import bigcode
from gqa_convert.modeling.transpile.rule import Part, Rule, Source, copy, register

if TYPE_CHECKING:
    from torch import Tensor

_OFFSET = 2  # rows of embed_positions before position 0 (OPTLearnedPositionalEmbedding)
_LINEAR = (("attn.c_proj", "self_attn.out_proj"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2"))
_NORMS = (("ln_1", "self_attn_layer_norm"), ("ln_2", "final_layer_norm"))


def _config(source: Source) -> dict[str, Any]:
    config = source.config
    return bigcode.bigcode_config(
        source,
        positions=config.max_position_embeddings,
        inner=config.ffn_dim,
        act=config.activation_function,
        layer_norm_epsilon=1e-5,  # nn.LayerNorm's default: OPT has no setting for it
        scale_attn_weights=True,
        initializer_range=config.init_std,
        resid_pdrop=config.dropout,
        embd_pdrop=0.0,  # OPT drops nothing of its embeddings
        attn_pdrop=config.attention_dropout,
    )


def _parts(source: Source) -> Iterable[Part]:
    config, of = source.config, "model.decoder"
    yield copy("transformer.wte.weight", f"{of}.embed_tokens.weight")
    yield Part(
        key="transformer.wpe.weight",
        sources=(f"{of}.embed_positions.weight",),
        shape=(config.max_position_embeddings, config.hidden_size),
        make=_positions,
    )
    for layer in range(config.num_hidden_layers):
        yield from _layer(source, f"transformer.h.{layer}", f"{of}.layers.{layer}")
    yield from _norm(source, "transformer.ln_f", f"{of}.final_layer_norm")
    if "lm_head.weight" in source.infos:
        yield copy("lm_head.weight", "lm_head.weight")


def _layer(source: Source, to: str, of: str) -> Iterable[Part]:
    config = source.config
    width = config.hidden_size
    for target, origin in _NORMS:
        yield from _norm(source, f"{to}.{target}", f"{of}.{origin}")
    make = partial(bigcode.attention_rows, heads=config.num_attention_heads)
    projections = [f"{of}.self_attn.{name}_proj" for name in "qkv"]
    weights = tuple(f"{name}.weight" for name in projections)
    yield Part(key=f"{to}.attn.c_attn.weight", sources=weights, shape=(3 * width, width), make=make)
    if config.enable_bias:
        biases = tuple(f"{name}.bias" for name in projections)
        yield Part(key=f"{to}.attn.c_attn.bias", sources=biases, shape=(3 * width,), make=make)
    else:
        yield bigcode.constant(f"{to}.attn.c_attn.bias", 3 * width, weights[0], 0)
    for target, origin in _LINEAR:
        weight = f"{of}.{origin}.weight"
        yield copy(f"{to}.{target}.weight", weight)
        if config.enable_bias:
            yield copy(f"{to}.{target}.bias", f"{of}.{origin}.bias")
        else:
            yield bigcode.constant(f"{to}.{target}.bias", source.info(weight).shape[0], weight, 0)


def _norm(source: Source, to: str, of: str) -> Iterable[Part]:
    for kind, value in (("weight", 1), ("bias", 0)):
        if source.config.layer_norm_elementwise_affine:
            yield copy(f"{to}.{kind}", f"{of}.{kind}")
        else:
            like = "model.decoder.embed_tokens.weight"
            yield bigcode.constant(f"{to}.{kind}", source.config.hidden_size, like, value)


def _positions(table: Tensor) -> Tensor:
    return table[_OFFSET:]


def _refusal(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "its LayerNorms follow attention and MLP (do_layer_norm_before=false)"
    if config._remove_final_layer_norm:
        return "it has no last LayerNorm (_remove_final_layer_norm)"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"its embeddings are projected (word_embed_proj_dim={config.word_embed_proj_dim})"
    return None


def _notes(config: Any) -> tuple[str, ...]:
    return (
        "left padding: OPT counts positions from the attention mask, GPTBigCode takes position_ids; `generate` passes "
        "them, a forward pass of your own must",
    )


register(
    Rule(
        name="opt",
        sources=("opt",),
        source_class="OPTForCausalLM",
        target="gpt_bigcode",
        target_class=bigcode.CLASS,
        why="both have learned positions and LayerNorms before attention and MLP; OPT's first two position rows, which "
        "no token reads, are left out",
        refusal=_refusal,
        config=_config,
        parts=_parts,
        only_groups=bigcode.ONLY_GROUPS,
        notes=_notes,
    )
)
