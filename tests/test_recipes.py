"""Recipes end to end: presets and their options on tiny models of several architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gqa_convert import convert, plan
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.recipe import PRESETS, Recipe, make_recipe
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config

SMALL = {"sequences": 8, "length": 32, "refit_steps": 5, "refit_tokens": 64}


def tiny_folder(folder: Path, model_type: str) -> Path:
    tiny_model(tiny_config(model_type)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "phi", "gpt_oss", "olmo2"])
def test_best_preset_keeps_its_word_on_every_kind_of_attention(tmp_path: Path, model_type: str) -> None:
    source = tiny_folder(tmp_path / "source", model_type)
    result = convert(source, groups=2, recipe=make_recipe("best", **SMALL), verify="logits")
    assert len(result.blocks) == 2
    for block in result.blocks:
        assert block.error_before is not None
        assert block.error_after is not None
        assert block.error_after <= block.error_before
    solved = set(result.plan.blocks.raw_keys) if result.plan.blocks else set()
    before, after = Checkpoint.open(source), Checkpoint.open(result.out)
    for key in before.tensors.keys() - solved - {merge.key for merge in result.plan.anatomy.merges}:
        assert before.tensor(key).equal(after.tensor(key)), key
    assert not list(tmp_path.glob(".*"))


def test_presets_go_without_search_where_heads_cannot_move(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "t5")
    with pytest.raises(UsageError, match="cannot write text from nothing"):
        plan(source, groups=2, recipe=make_recipe("fast"))  # found when planning, not after it
    (tmp_path / "text.txt").write_text("words to calibrate on\n" * 20)
    text = str(tmp_path / "text.txt")
    planned = plan(source, groups=2, recipe=make_recipe("fast", calibrate=text))
    assert planned.recipe.grouping == "search", "of cross-attention, which has no position bias"
    assert any("contiguous in self-attention" in note for note in planned.notes)
    biased = tiny_folder(tmp_path / "biased", "bloom")  # a slope for each head, and no cross-attention
    planned = plan(biased, groups=2, recipe=make_recipe("fast", calibrate=text), allow_slow=True)
    assert planned.recipe.grouping == "contiguous"
    assert any("cannot change places" in note for note in planned.notes)
    with pytest.raises(UnsupportedModelError, match="--grouping search cannot be used on bloom"):
        plan(biased, groups=2, recipe=make_recipe("fast", grouping="search", calibrate=text), allow_slow=True)


def test_solved_layers_are_reused_and_give_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "llama")
    recipe = make_recipe("best", **SMALL)
    work = tmp_path / "work"
    first = convert(source, groups=2, out=tmp_path / "a", recipe=recipe, work=work)
    seen: list[str] = []
    second = convert(
        source, groups=2, out=tmp_path / "b", recipe=recipe, work=work, on_layer=lambda what, *_: seen.append(what)
    )
    assert (first.out / "model.safetensors").read_bytes() == (second.out / "model.safetensors").read_bytes()
    assert not any("writing" in what for what in seen)
    assert work.is_dir()


def test_provenance_tells_the_recipe_and_each_block(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "llama")
    result = convert(source, groups=4, recipe=Recipe(method="pca", grouping="search"))
    record = json.loads((result.out / "gqa_convert.json").read_text())
    assert record["conversion"]["recipe"]["method"] == "pca"
    assert [block["module"] for block in record["blocks"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(len(block["grouping"]) == 4 for block in record["blocks"])


def test_search_alone_moves_heads_under_the_mean(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "llama")
    result = convert(source, groups=2, recipe=Recipe(grouping="search"), verify="logits")
    assert result.checks["logit_difference"] <= 1e-4 * result.checks["logit_scale"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"preset": "fastest"}, "--preset fastest: did you mean fast.*paper, fast, best"),
        ({"method": "meen"}, "Did you mean mean"),
        ({"grouping": "random"}, "--grouping random: choose one of contiguous, search"),
        ({"fold": True}, "--fold: the method mean has no use for it"),
        ({"refit": True}, "--refit: needs text to fit on"),
        ({"sequences": 0}, "--calibration-sequences 0: must be at least 1"),
        ({"max_context": 0}, "--max-context 0"),
        ({"refit_lr": -1.0}, "--refit-lr -1.0"),
    ],
)
def test_choices_that_cannot_be_honoured(chosen: dict[str, Any], message: str) -> None:
    chosen = dict(chosen)
    preset = chosen.pop("preset", None)
    with pytest.raises(UsageError, match=message):
        make_recipe(preset, **chosen)


def test_an_override_keeps_the_rest_of_a_preset() -> None:
    recipe = make_recipe("best", refit_steps=10)
    assert recipe.refit_steps == 10
    assert recipe.method == PRESETS["best"][1].method == "pca"
    assert recipe.adaptable
