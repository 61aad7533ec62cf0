"""GPT-NeoX with a sequential residual (`use_parallel_residual: false`) and partly rotary heads as Nemotron.

Nemotron's LayerNorm multiplies by one plus its weight, so the stored weight is one less.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling.transpile.configs import common, rotary
from gqa_convert.modeling.transpile.neox import attention_and_mlp, sizes, turns_whole_heads
from gqa_convert.modeling.transpile.rule import Part, Rule, Source, copy, register

if TYPE_CHECKING:
    from torch import Tensor

_NORMS = ("input_layernorm", "post_attention_layernorm")


def _config(source: Source) -> dict[str, Any]:
    config = source.config
    return {
        **common(source, model_type="nemotron", architecture="NemotronForCausalLM"),
        **sizes(config),
        "head_dim": config.hidden_size // config.num_attention_heads,
        "norm_eps": config.layer_norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": True,
        **rotary(config.rope_parameters, config.rope_parameters.get("partial_rotary_factor", 1.0)),
    }


def _parts(source: Source) -> Iterable[Part]:
    yield copy("model.embed_tokens.weight", "gpt_neox.embed_in.weight")
    for layer in range(source.config.num_hidden_layers):
        yield from _layer(source, f"model.layers.{layer}", f"gpt_neox.layers.{layer}")
    yield from _norm(source, "model.norm", "gpt_neox.final_layer_norm")
    if "lm_head.weight" in source.infos:
        yield copy("lm_head.weight", "lm_head.weight")


def _layer(source: Source, to: str, of: str) -> Iterable[Part]:
    for name in _NORMS:
        yield from _norm(source, f"{to}.{name}", f"{of}.{name}")
    yield from attention_and_mlp(source, to, of, "up_proj", "down_proj")


def _norm(source: Source, to: str, of: str) -> Iterable[Part]:
    yield Part(
        key=f"{to}.weight", sources=(f"{of}.weight",), shape=(source.config.hidden_size,), make=partial(_less_one)
    )
    yield copy(f"{to}.bias", f"{of}.bias")


def _less_one(weight: Tensor) -> Tensor:
    return weight.double() - 1.0


def _sequential(config: Any) -> bool:
    return not config.use_parallel_residual and not turns_whole_heads(config)


def _notes(config: Any) -> tuple[str, ...]:
    if not config.hidden_dropout:
        return ()
    return (f"hidden_dropout={config.hidden_dropout} is lost: Nemotron has none; only training would use it",)


register(
    Rule(
        name="gpt_neox_sequential",
        sources=("gpt_neox",),
        source_class="GPTNeoXForCausalLM",
        target="nemotron",
        target_class="NemotronForCausalLM",
        why="both have a sequential residual of LayerNorm, attention and an ungated MLP; Nemotron stores norm weights "
        "less one",
        rounding="LayerNorm weights below 0.5, which are stored less one",
        applies=_sequential,
        config=_config,
        parts=_parts,
        notes=_notes,
    )
)
