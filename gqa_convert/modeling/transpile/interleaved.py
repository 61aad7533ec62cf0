"""What GPT-J and CodeGen have in common on their way to Phi."""

from __future__ import annotations

from typing import Any

from gqa_convert.modeling.transpile import phi
from gqa_convert.modeling.transpile.configs import rotary_share
from gqa_convert.modeling.transpile.rule import Source

THETA = 10000.0  # written into both modelling files; neither has a setting for it
NORMS_AND_MLP = (("input_layernorm", "ln_1"), ("mlp.fc1", "mlp.fc_in"), ("mlp.fc2", "mlp.fc_out"))


def block_config(source: Source) -> dict[str, Any]:
    """config.json of the Phi model."""
    config = source.config
    inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    return phi.phi_config(
        source,
        intermediate=inner,
        act=config.activation_function,
        eps=config.layer_norm_epsilon,
        rope={"rope_theta": THETA},
        share=rotary_share(config.rotary_dim, config.hidden_size // config.num_attention_heads),
        dropouts=(config.resid_pdrop, config.embd_pdrop, config.attn_pdrop),
    )


def rotary_refusal(config: Any) -> str | None:
    """Why a rotary setting cannot be Phi's; None if it can."""
    head_dim = config.hidden_size // config.num_attention_heads
    size = config.rotary_dim
    if not size or size % 2 or size > head_dim:
        return f"rotary_dim={size} is no even part of head_dim={head_dim}"
    return None
