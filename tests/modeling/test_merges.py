"""Merges that rotate heads work on the families without a setting, where a tiny model proves that they may."""

from __future__ import annotations

from pathlib import Path

import pytest

from gqa_convert import convert, plan
from gqa_convert.contract.kv_axes import KVAxes
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.modeling import shipping
from gqa_convert.tiny.forward import difference, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config


@pytest.mark.parametrize("model_type", ["t5", "bart", "bert", "gpt2", "opt"])
def test_pca_loses_nothing_of_heads_that_are_tied(model_type: str, tmp_path: Path) -> None:
    small = tiny_model(tiny_config(model_type, num_kv_heads=2))
    large = tiny_model(tiny_config(model_type), seed=1)
    large.load_state_dict(KVAxes(large, small, 8, 2).expand(small.state_dict()))
    large.save_pretrained(tmp_path / "source")
    result = convert(tmp_path / "source", groups=2, out=tmp_path / "out", recipe=Recipe(method="pca"))
    assert result.plan.blocks is not None
    freedom = result.plan.blocks.freedom
    assert (freedom.rotary_kind, freedom.key_gauge, freedom.value_gauge) == ("none", "full", "full")
    config = result.plan.anatomy.target_config
    grouped = shipping.class_named(config.architectures[0]).from_pretrained(tmp_path / "out").eval()
    inputs = text_inputs(large)
    assert difference(logits(large, inputs), logits(grouped, inputs)) < 1e-4


def test_a_bias_shared_by_all_layers_keeps_t5s_heads_in_place(tmp_path: Path) -> None:
    tiny_model(tiny_config("t5")).save_pretrained(tmp_path / "source")
    planned = plan(tmp_path / "source", groups=2, recipe=Recipe(method="pca", grouping="search", adaptable=True))
    assert planned.recipe.grouping == "search", "of cross-attention's heads, which are not tied"
    assert any("groups are contiguous in self-attention" in note for note in planned.notes)
