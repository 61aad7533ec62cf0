"""GPT-NeoX with a parallel residual (Pythia, GPT-NeoX-20B) as Phi.

NeoX norms the same input twice, with two sets of weights; Phi norms it once. Both sets move into the layers that read
them, and Phi's own norm keeps neither scale nor shift.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling.transpile import phi
from gqa_convert.modeling.transpile.rule import Part, Rule, Source, copy, register
from gqa_convert.modeling.transpile.tensors import fold_scale, fold_shift, ones, per_head, zeros

if TYPE_CHECKING:
    from torch import Tensor


def _config(source: Source) -> dict[str, Any]:
    config = source.config
    return phi.phi_config(
        source,
        intermediate=config.intermediate_size,
        act=config.hidden_act,
        eps=config.layer_norm_eps,
        rope=config.rope_parameters,
        share=config.rope_parameters.get("partial_rotary_factor", 1.0),
        dropouts=(config.hidden_dropout, config.hidden_dropout, config.attention_dropout),
    )


def _parts(source: Source) -> Iterable[Part]:
    yield copy("model.embed_tokens.weight", "gpt_neox.embed_in.weight")
    for layer in range(source.config.num_hidden_layers):
        yield from _layer(source, f"model.layers.{layer}", f"gpt_neox.layers.{layer}")
    yield from phi.renamed(source, [("model.final_layernorm", "gpt_neox.final_layer_norm")])
    yield from phi.head(source, "lm_head", "gpt_neox.embed_in")


def _layer(source: Source, to: str, of: str) -> Iterable[Part]:
    config = source.config
    width, heads = config.hidden_size, config.num_attention_heads
    norm = f"{of}.input_layernorm"
    yield Part(key=f"{to}.input_layernorm.weight", like=f"{norm}.weight", shape=(width,), make=partial(ones, width))
    yield Part(key=f"{to}.input_layernorm.bias", like=f"{norm}.bias", shape=(width,), make=partial(zeros, width))
    for which, name in enumerate(("q_proj", "k_proj", "v_proj")):
        fused = f"{of}.attention.query_key_value"
        yield from _folded(source, f"{to}.self_attn.{name}", fused, norm, (heads, which), width)
    yield from phi.renamed(source, [(f"{to}.self_attn.dense", f"{of}.attention.dense")])
    norm = f"{of}.post_attention_layernorm"
    yield from _folded(source, f"{to}.mlp.fc1", f"{of}.mlp.dense_h_to_4h", norm, None, config.intermediate_size)
    yield from phi.renamed(source, [(f"{to}.mlp.fc2", f"{of}.mlp.dense_4h_to_h")])


def _folded(source: Source, to: str, of: str, norm: str, heads: tuple[int, int] | None, size: int) -> Iterable[Part]:
    """A linear layer with the norm before it folded in: `size` rows, those of q, k or v if `heads` says which."""
    weight, bias = f"{of}.weight", f"{of}.bias"
    shape = (size, source.config.hidden_size)
    yield Part(key=f"{to}.weight", sources=(weight, f"{norm}.weight"), shape=shape, make=partial(_scaled, heads=heads))
    own = (bias,) if bias in source.infos else ()
    yield Part(
        key=f"{to}.bias", sources=(weight, f"{norm}.bias", *own), shape=(size,), make=partial(_shifted, heads=heads)
    )


def _scaled(weight: Tensor, scale: Tensor, *, heads: tuple[int, int] | None) -> Tensor:
    return fold_scale(_cut(weight, heads), scale)


def _shifted(weight: Tensor, shift: Tensor, bias: Tensor | None = None, *, heads: tuple[int, int] | None) -> Tensor:
    return fold_shift(_cut(weight, heads), shift, None if bias is None else _cut(bias, heads))


def _cut(x: Tensor, heads: tuple[int, int] | None) -> Tensor:
    return x if heads is None else per_head(x, *heads)


def _parallel(config: Any) -> bool:
    return bool(config.use_parallel_residual)


register(
    Rule(
        name="gpt_neox_parallel",
        sources=("gpt_neox",),
        source_class="GPTNeoXForCausalLM",
        target="phi",
        target_class=phi.CLASS,
        why="both have a parallel residual; NeoX's two LayerNorms of one input are folded into q, k, v and fc1",
        rounding="q, k, v and fc1, which take up the LayerNorms",
        applies=_parallel,
        config=_config,
        parts=_parts,
    )
)
