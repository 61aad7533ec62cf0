"""Per-head parameters beside q, k, v and o are found by proof and change places with their heads, exactly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gqa_convert import convert
from gqa_convert.anatomy.blocks import block_state, layout_for, read_block, rotary_layouts
from gqa_convert.anatomy.extras import moved_extras
from gqa_convert.anatomy.freedom import _subject, prove_freedom
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.heads import Grouping
from gqa_convert.modeling import shipping
from gqa_convert.tiny.forward import logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config

NORMS = {"q_norm.weight", "k_norm.weight"}


@pytest.mark.parametrize(
    ("model_type", "switch", "expected"),
    [
        ("llama", None, set()),
        ("qwen3", None, set()),  # one norm for all heads stays where it is
        ("olmo2", None, NORMS),
        ("gpt_oss", None, {"sinks"}),
        ("cohere", "use_qk_norm", NORMS),
        ("stablelm", "qk_layernorm", {"q_layernorm.norms.{}.weight", "k_layernorm.norms.{}.weight"}),
        ("chameleon", None, NORMS | {"q_norm.bias", "k_norm.bias"}),
    ],
)
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_heads_move_with_all_that_is_theirs(
    model_type: str, switch: str | None, expected: set[str], kv_heads: int
) -> None:
    config = tiny_config(model_type, num_kv_heads=kv_heads)
    if switch:
        setattr(config, switch, True)
    freedom = prove_freedom(config)
    assert freedom.permutable
    assert {extra.name for extra in freedom.extras} == expected
    assert {extra.name: extra.heads for extra in freedom.extras} == {
        name: "kv" if name.startswith("k_") else "query" for name in expected
    }


def test_the_logits_stay_only_if_the_extras_move_too() -> None:
    config = tiny_config("olmo2", num_kv_heads=4)
    subject, freedom = _subject(config), prove_freedom(config)
    assert subject.permutes(freedom, freedom.extras)
    assert not subject.permutes(freedom, ())
    assert not subject.permutes(freedom, freedom.extras[:1])


def test_a_table_that_all_layers_share_ties_heads_to_their_places() -> None:
    """Layers move their heads in different orders; T5's position bias has one order for all of them."""
    freedom = prove_freedom(tiny_config("t5"))
    assert not freedom.permutable
    assert freedom.cross_permutable, "cross-attention reads no positions"
    assert not prove_freedom(tiny_config("bart")).cross_permutable, "said of what is tied elsewhere alone"
    assert prove_freedom(tiny_config("bart")).permutable


def test_tied_heads_of_t5s_cross_attention_are_found_where_they_lie_apart(tmp_path: Path) -> None:
    """Its self-attention's lie side by side, where a search may not move them."""
    model = tiny_model(tiny_config("t5"))
    state = model.state_dict()
    for name, tensor in state.items():
        if re.search(r"decoder.*EncDecAttention\.[kv]\.", name):
            tensor[tensor.shape[0] // 2 :] = tensor[: tensor.shape[0] // 2]
        elif re.search(r"decoder.*SelfAttention\.[kv]\.", name):
            heads = tensor.view(8, -1, tensor.shape[1])
            heads[1::2] = heads[::2]
    model.save_pretrained(tmp_path / "source")
    recipe = Recipe(method="mean", grouping="search")
    conversion = convert(tmp_path / "source", groups=4, recipe=recipe, out=tmp_path / "out")
    found = {"EncDec" in report.module: report.grouping for report in conversion.blocks}
    assert found == {True: ((0, 4), (1, 5), (2, 6), (3, 7)), False: ((0, 1), (2, 3), (4, 5), (6, 7))}
    converted = shipping.class_named(conversion.plan.anatomy.target_config.architectures[0])
    grouped = converted.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    inputs = text_inputs(model)
    torch.testing.assert_close(logits(grouped, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt_oss", "olmo2"])
def test_a_grouped_model_in_another_order_gives_the_same_logits(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type, num_kv_heads=4))
    inputs, freedom, blocks = text_inputs(model), prove_freedom(model.config), _subject(model.config).blocks
    before, state = logits(model, inputs), dict(model.state_dict())
    grouping = Grouping(((2, 0), (3, 1)))
    moved: dict[str, torch.Tensor] = {}
    for names in blocks:
        block = read_block(state.get, names, freedom, layout_for(names, model, rotary_layouts(model, freedom)))
        moved |= block_state(names, block.permuted(grouping))
        moved |= moved_extras(state.get, names, freedom.extras, block.query_order(grouping), grouping.order)
    model.load_state_dict(state | moved)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("olmo2", {}), ("gpt_oss", {}), ("cohere", {"use_qk_norm": True}), ("stablelm", {"qk_layernorm": True})],
)
def test_tied_heads_that_lie_apart_are_found_and_merged_without_a_change(
    model_type: str, changes: dict[str, bool], tmp_path: Path
) -> None:
    """Heads 0 and 4, 1 and 5 ... are the same; a search brings them together, and all their parameters with them."""
    model = tiny_model(tiny_config(model_type, changes=changes))
    state = model.state_dict()
    for name, tensor in state.items():
        if re.search(r"\.(k_proj|v_proj|k_norm)\.", name):
            half = tensor.shape[0] // 2
            tensor[half:] = tensor[:half]
        if member := re.search(r"(k_layernorm\.norms\.)(\d)\b", name):
            tensor.copy_(state[name.replace(member[0], f"{member[1]}{int(member[2]) % 4}")])
    model.save_pretrained(tmp_path / "source")
    recipe = Recipe(method="mean", grouping="search")
    conversion = convert(tmp_path / "source", groups=4, recipe=recipe, out=tmp_path / "out")
    assert {report.grouping for report in conversion.blocks} == {((0, 4), (1, 5), (2, 6), (3, 7))}
    converted = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    inputs = text_inputs(model)
    torch.testing.assert_close(logits(converted, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "invariant"),
    [("llama", True), ("t5", True), ("bloom", True), ("gpt_oss", False), ("gemma2", False)],
    ids=["", "own code", "fused", "sinks", "soft cap"],
)
def test_a_vector_on_all_keys_is_lost_unless_something_stands_beside_the_scores(
    model_type: str, invariant: bool
) -> None:
    assert prove_freedom(tiny_config(model_type)).shift_invariant == invariant
