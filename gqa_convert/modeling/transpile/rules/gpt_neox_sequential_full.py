"""GPT-NeoX with a sequential residual and heads that are rotary throughout (`rotary_pct: 1.0`) as StarCoder2.

RedPajama-INCITE, OpenCALM and rinna's GPT-NeoX are of this kind. No number changes.
Engines compute StarCoder2 right more often than Nemotron, the target of the partly rotary ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from gqa_convert.modeling.transpile.configs import common, rotary
from gqa_convert.modeling.transpile.neox import attention_and_mlp, sizes, turns_whole_heads
from gqa_convert.modeling.transpile.rule import Part, Rule, Source, copy, register
from gqa_convert.modeling.transpile.tensors import zeros

_NORMS = ("input_layernorm", "post_attention_layernorm")


def _config(source: Source) -> dict[str, Any]:
    config = source.config
    return {
        **common(source, model_type="starcoder2", architecture="Starcoder2ForCausalLM"),
        **sizes(config),
        "norm_epsilon": config.layer_norm_eps,
        "norm_type": "layer_norm",
        "mlp_type": "default",
        "use_bias": True,
        "sliding_window": None,
        "residual_dropout": config.hidden_dropout,
        "embedding_dropout": config.hidden_dropout,
        **rotary(config.rope_parameters, 1.0),
    }


def _parts(source: Source) -> Iterable[Part]:
    yield copy("model.embed_tokens.weight", "gpt_neox.embed_in.weight")
    for layer in range(source.config.num_hidden_layers):
        to, of = f"model.layers.{layer}", f"gpt_neox.layers.{layer}"
        for name in _NORMS:
            yield from _renamed(f"{to}.{name}", f"{of}.{name}")
        yield from attention_and_mlp(source, to, of, "c_fc", "c_proj")
        if not source.config.attention_bias:
            width = source.config.hidden_size
            like = f"{of}.attention.query_key_value.weight"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield Part(key=f"{to}.self_attn.{name}.bias", like=like, shape=(width,), make=partial(zeros, width))
    yield from _renamed("model.norm", "gpt_neox.final_layer_norm")
    if "lm_head.weight" in source.infos:
        yield copy("lm_head.weight", "lm_head.weight")


def _renamed(to: str, of: str) -> Iterable[Part]:
    for kind in ("weight", "bias"):
        yield copy(f"{to}.{kind}", f"{of}.{kind}")


def _applies(config: Any) -> bool:
    return not config.use_parallel_residual and turns_whole_heads(config)


register(
    Rule(
        name="gpt_neox_sequential_full",
        sources=("gpt_neox",),
        source_class="GPTNeoXForCausalLM",
        target="starcoder2",
        target_class="Starcoder2ForCausalLM",
        why="both have a sequential residual of LayerNorm, rotary attention and an ungated MLP, with biases",
        applies=_applies,
        config=_config,
        parts=_parts,
    )
)
