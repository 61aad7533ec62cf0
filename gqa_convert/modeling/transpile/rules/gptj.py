"""GPT-J as Phi: the same parallel block. GPT-J turns neighbours (2i, 2i+1), Phi turns halves (i, i + R/2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gqa_convert.modeling.transpile import phi
from gqa_convert.modeling.transpile.interleaved import NORMS_AND_MLP, block_config, rotary_refusal
from gqa_convert.modeling.transpile.rule import Part, Rule, Source, copy, register
from gqa_convert.modeling.transpile.tensors import halves_first, rows


def _parts(source: Source) -> Iterable[Part]:
    config = source.config
    heads, width = config.num_attention_heads, config.hidden_size
    yield copy("model.embed_tokens.weight", "transformer.wte.weight")
    for layer in range(config.num_hidden_layers):
        to, of = f"model.layers.{layer}", f"transformer.h.{layer}"
        for name in ("q_proj", "k_proj"):
            origin = f"{of}.attn.{name}.weight"
            turned = rows(halves_first, heads, config.rotary_dim)
            yield Part(key=f"{to}.self_attn.{name}.weight", sources=(origin,), shape=(width, width), make=turned)
            yield phi.zero_bias(f"{to}.self_attn.{name}.bias", width, origin)
        pairs = [("self_attn.v_proj", "attn.v_proj"), ("self_attn.dense", "attn.out_proj"), *NORMS_AND_MLP]
        yield from phi.renamed(source, [(f"{to}.{target}", f"{of}.{origin}") for target, origin in pairs])
    yield from phi.renamed(source, [("model.final_layernorm", "transformer.ln_f")])
    yield from phi.head(source, "lm_head", "transformer.wte")


def _refusal(config: Any) -> str | None:
    return rotary_refusal(config)


register(
    Rule(
        name="gptj",
        sources=("gptj",),
        source_class="GPTJForCausalLM",
        target="phi",
        target_class=phi.CLASS,
        why="both have a parallel residual behind one LayerNorm; rows of q and k are re-ordered from GPT-J's "
        "interleaved rotary pairs to Phi's halves, and biases that GPT-J lacks are zero",
        refusal=_refusal,
        config=block_config,
        parts=_parts,
    )
)
