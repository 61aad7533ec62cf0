"""Weights that do not fill the model of config.json are refused when planning; what is left over is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gqa_convert import convert, plan
from gqa_convert.anatomy.filling import check_loads
from gqa_convert.conversion.inspect import inspect, verify_pair
from gqa_convert.errors import CheckpointError, VerificationError
from gqa_convert.hf.loading import Source
from tests import factories
from tests.support import Command

DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def without(*keys: str) -> Callable[[factories.Tensors], None]:
    def change(tensors: factories.Tensors) -> None:
        for key in keys:
            del tensors[key]

    return change


@pytest.mark.parametrize("family", sorted(factories.FAMILIES))
def test_what_transformers_saves_fills_the_model(family: str, tmp_path: Path) -> None:
    result = check_loads(Source.open(factories.make(tmp_path / "source", family)))
    assert (result.fault, result.unread) == ("", ())


def test_missing_tensors_are_named_by_every_command(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    out = convert(source, groups=2).out
    factories.change_tensors(source, without(DOWN, QUERY))
    for arguments in (("plan", source, "--groups", 2), ("inspect", source), ("verify", source, out)):
        finished = command("gqa", *arguments)
        assert (finished.code, len(finished.err.splitlines())) == (4, 1), arguments
        assert DOWN in finished.err
        assert QUERY in finished.err
    for again in (("--dry-run",), ("--out", tmp_path / "other")):
        assert command("gqa-convert", source, "--groups", 2, *again).code == 4
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 256}, "model.embed_tokens.weight"),
        ({"intermediate_size": 64}, "mlp"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_attention_heads": 16}, "self_attn"),
        ({"attention_bias": True}, "bias"),
    ],
)
def test_a_configuration_of_another_size_is_refused(changes: dict[str, object], named: str, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llama-head-dim")
    factories.change_config(source, **changes)
    with pytest.raises(CheckpointError, match=named):
        plan(source, groups=2)


def test_a_written_folder_must_fill_the_model(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    out = convert(source, groups=2).out
    factories.change_tensors(out, without(DOWN))
    with pytest.raises(VerificationError, match="down_proj"):
        verify_pair(source, out)


def test_tied_weights_need_one_tensor(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    factories.change_config(source, tie_word_embeddings=True)
    assert plan(source, groups=2).copied_tensors  # two different tensors: both are kept
    factories.change_tensors(source, without("lm_head.weight"))
    convert(source, groups=2, verify="logits")
    factories.change_tensors(source, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert check_loads(Source.open(source)).missing == ()
    factories.change_tensors(source, without("lm_head.weight"))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        plan(source, groups=2)


def test_tensors_that_nothing_reads_are_named(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    factories.change_tensors(source, lambda t: t.update({"draft.head.weight": torch.zeros(3)}))
    planned = plan(source, groups=2)
    assert [note for note in planned.notes if "draft.head.weight" in note]
    out = convert(source, groups=2).out
    assert factories.tensors_of(out)["draft.head.weight"].shape == (3,)


def test_a_bias_that_is_switched_off_is_merged_all_the_same(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llama-bias")
    factories.change_config(source, attention_bias=False)
    planned = plan(source, groups=2)
    assert any("no code reads" in note and "bias" in note for note in planned.notes)
    out = convert(source, groups=2, verify="logits").out
    shapes = {key: shape for key, shape in factories.shapes_of(out).items() if key.endswith("bias")}
    assert all(list(shape) == ([16] if "k_proj" in key or "v_proj" in key else [64]) for key, shape in shapes.items())
    factories.change_config(out, attention_bias=True)
    factories.load(out)
    assert inspect(source).layout.num_kv_heads == 8


def test_a_leftover_quantization_config_is_named(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    factories.change_config(source, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert any("quantization_config (bitsandbytes)" in note for note in plan(source, groups=2).notes)


def test_kv_heads_stated_twice_are_edited_twice(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "qwen2_vl")
    config = json.loads((source / "config.json").read_text())
    factories.change_config(source, num_key_value_heads=config["text_config"]["num_key_value_heads"], n_kv_heads=8)
    written = json.loads((convert(source, groups=2, verify="logits").out / "config.json").read_text())
    assert (written["num_key_value_heads"], written["n_kv_heads"]) == (2, 2)
    assert written["text_config"]["num_key_value_heads"] == 2
    assert written["vision_config"] == config["vision_config"]
