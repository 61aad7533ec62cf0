"""CodeGen as Phi: GPT-J's block with q, v and k fused in four blocks, one for each core it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling.transpile import phi
from gqa_convert.modeling.transpile.interleaved import NORMS_AND_MLP, block_config, rotary_refusal
from gqa_convert.modeling.transpile.rule import Part, Rule, Source, copy, register
from gqa_convert.modeling.transpile.tensors import from_blocks, halves_first, rows

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 4  # mp_num in the modelling code, whatever the model's size
_ORDER = {"q_proj": 0, "v_proj": 1, "k_proj": 2}  # within a block


def _parts(source: Source) -> Iterable[Part]:
    config = source.config
    width = config.hidden_size
    yield copy("model.embed_tokens.weight", "transformer.wte.weight")
    for layer in range(config.num_hidden_layers):
        to, of = f"model.layers.{layer}", f"transformer.h.{layer}"
        fused = f"{of}.attn.qkv_proj.weight"
        for name, which in _ORDER.items():
            turned = 0 if name == "v_proj" else config.rotary_dim
            make = rows(_cut, which, config.num_attention_heads, turned)
            yield Part(key=f"{to}.self_attn.{name}.weight", sources=(fused,), shape=(width, width), make=make)
            yield phi.zero_bias(f"{to}.self_attn.{name}.bias", width, fused)
        pairs = [("self_attn.dense", "attn.out_proj"), *NORMS_AND_MLP]
        yield from phi.renamed(source, [(f"{to}.{target}", f"{of}.{origin}") for target, origin in pairs])
    yield from phi.renamed(source, [("model.final_layernorm", "transformer.ln_f")])
    yield from phi.head(source, "lm_head", "transformer.wte")


def _cut(fused: Tensor, which: int, heads: int, rotary: int) -> Tensor:
    part = from_blocks(fused, BLOCKS, which)
    return halves_first(part, heads, rotary) if rotary else part


def _refusal(config: Any) -> str | None:
    if config.num_attention_heads % BLOCKS:
        return f"{config.num_attention_heads} heads do not lie in {BLOCKS} blocks"
    return rotary_refusal(config)


register(
    Rule(
        name="codegen",
        sources=("codegen",),
        source_class="CodeGenForCausalLM",
        target="phi",
        target_class=phi.CLASS,
        why="both have a parallel residual behind one LayerNorm; the four blocks of [q v k] are taken apart, rows of q "
        "and k re-ordered from interleaved rotary pairs to Phi's halves, and biases that CodeGen lacks are zero",
        refusal=_refusal,
        config=block_config,
        parts=_parts,
    )
)
