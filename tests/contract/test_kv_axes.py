"""The yardstick itself: repeating heads and averaging them are inverse, and runs of heads are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gqa_convert.contract.kv_axes import KVAxes
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.overrides import KV_HEADS
from gqa_convert.tiny.shrink import tiny_config

FAMILIES = ["llama", "phi3", "gpt_bigcode", "falcon", "stablelm", "olmo2", "cohere", "mimo_v2_flash", "inkling2_text"]


def axes_of(model_type: str, **changes: Any) -> KVAxes:
    heads, groups = KV_HEADS.get(model_type, (8, 2))
    large, small = (
        tiny_model(tiny_config(model_type, num_kv_heads=kv, changes=changes), seed)
        for seed, kv in ((0, heads), (1, groups))
    )
    return KVAxes(large, small, heads, groups)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_averaging_repeated_heads_gives_them_back(model_type: str) -> None:
    axes = axes_of(model_type, qk_layernorm=True, use_qk_norm=True)
    state = axes.small.state_dict()
    back = axes.pool(axes.expand(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_group_is_a_run_of_heads() -> None:
    axes = axes_of("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    small = axes.small.state_dict()[name].view(2, 8, -1)
    large = axes.expand(axes.small.state_dict())[name].view(8, 8, -1)
    assert all(torch.equal(large[head], small[head // 4]) for head in range(8))


def test_changed_names_are_those_of_keys_and_values() -> None:
    assert {name.split("self_attn.")[1] for name in axes_of("olmo2").changed()} == {
        "k_proj.weight",
        "v_proj.weight",
        "k_norm.weight",
    }
