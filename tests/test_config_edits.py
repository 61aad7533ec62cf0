"""config.json after a conversion: byte for byte the source's but for the KV field, whatever its spelling."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from gqa_convert import convert
from gqa_convert.checkpoint.reader import Checkpoint
from tests import factories
from tests.factories import HEADS

LLAMA_OLD = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "num_key_value_heads": HEADS,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0.dev0",
    "vocab_size": 128,
}


def convert_with(source: Path, text: str, groups: int = 2) -> str:
    """Convert with config.json replaced; return the new one after seeing that it loads with `groups` KV heads."""
    (source / "config.json").write_bytes(text.encode())
    out = convert(source, groups=groups).out
    factories.load(out)
    return (out / "config.json").read_bytes().decode()


def changed_lines(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True))
    return [line.rstrip("\r\n") for line in lines if line[0] in "+-"]


def test_only_the_kv_field_changes(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    before = (source / "config.json").read_text()
    after = convert_with(source, before)
    assert changed_lines(before, after) == ['-   "num_key_value_heads": 8,', '+   "num_key_value_heads": 2,']


def test_old_spellings_stay_as_they_are(tmp_path: Path) -> None:
    """Other programs read `rope_theta` and `torch_dtype`; transformers 5 would not write them again."""
    before = json.dumps(LLAMA_OLD, indent=2) + "\n"
    after = convert_with(factories.make(tmp_path / "source"), before)
    assert after == before.replace('"num_key_value_heads": 8', '"num_key_value_heads": 2')
    assert '"rope_theta": 50000.0' in after
    assert '"rms_norm_eps": 1e-05' in after
    config = transformers.AutoConfig.from_pretrained(tmp_path / "source-gqa2")
    assert config.rope_parameters["rope_theta"] == 50000.0


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("compact", {"separators": (",", ":")}),
        ("tabs", {"indent": "\t"}),
        ("four", {"indent": 4, "sort_keys": True}),
        ("one line", {}),
    ],
)
def test_layout_of_the_file_is_kept(name: str, style: dict[str, Any], tmp_path: Path) -> None:
    before = json.dumps(LLAMA_OLD, **style)
    after = convert_with(factories.make(tmp_path / "source"), before)
    assert after == json.dumps({**LLAMA_OLD, "num_key_value_heads": 2}, **style)


def test_windows_line_ends_are_kept(tmp_path: Path) -> None:
    before = (json.dumps(LLAMA_OLD, indent=2) + "\n").replace("\n", "\r\n")
    after = convert_with(factories.make(tmp_path / "source"), before)
    assert after == before.replace('"num_key_value_heads": 8', '"num_key_value_heads": 2')


def test_an_absent_key_is_added_in_the_style_of_the_rest(tmp_path: Path) -> None:
    values = {key: value for key, value in LLAMA_OLD.items() if key != "num_key_value_heads"}
    before = json.dumps(values, indent=2) + "\n"
    after = convert_with(factories.make(tmp_path / "source"), before)
    assert json.loads(after) == {**values, "num_key_value_heads": 2}
    added = [line for line in changed_lines(before, after) if "num_key_value_heads" in line]
    assert len(changed_lines(before, after)) <= 3
    assert added[0].startswith('+   "num_key_value_heads": 2')


def test_a_number_that_stands_elsewhere_stays(tmp_path: Path) -> None:
    values = {**LLAMA_OLD, "note": {"num_key_value_heads": 8, "text": '"num_key_value_heads": 8'}}
    after = convert_with(factories.make(tmp_path / "source"), json.dumps(values, indent=2))
    assert json.loads(after) == {**values, "num_key_value_heads": 2}


def test_nested_configs_are_edited_where_the_decoder_is(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llava")
    out = convert(source, groups=4).out
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    before["text_config"]["num_key_value_heads"] = 4
    assert after == before


def test_flat_configs_of_nested_families(tmp_path: Path) -> None:
    """Qwen2-VL checkpoints on the hub keep the decoder's fields at the top level, beside the vision config."""
    source = factories.make(tmp_path / "source", "qwen2_vl")
    values = json.loads((source / "config.json").read_text())
    flat = {**values, **values.pop("text_config"), "model_type": "qwen2_vl"}
    del flat["text_config"]
    before = json.dumps(flat, indent=2)
    (source / "config.json").write_text(before)
    out = convert(source, groups=2).out
    after = (out / "config.json").read_text()
    assert changed_lines(before, after) == ['-   "num_key_value_heads": 8,', '+   "num_key_value_heads": 2,']
    factories.load(out, "qwen2_vl")


def test_dbrx_without_a_copy_of_the_field_gets_none(tmp_path: Path) -> None:
    """Checkpoints on the hub have `attn_config.kv_n_heads` alone; transformers 5 saves a copy beside it."""
    source = factories.make(tmp_path / "source", "dbrx")
    before = json.loads((factories.change_config(source, "num_key_value_heads") / "config.json").read_text())
    out = convert(source, groups=2).out
    before["attn_config"]["kv_n_heads"] = 2
    assert json.loads((out / "config.json").read_text()) == before
    factories.load(out, "dbrx")


def test_mha_written_through_the_gqa_field_is_mha(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "olmo2")
    assert Checkpoint.open(source).config["num_key_value_heads"] == HEADS
    assert convert(source, groups=HEADS).plan.layout_before.kind == "MHA"


def test_other_values_survive_that_a_reader_would_drop(tmp_path: Path) -> None:
    values = {**LLAMA_OLD, "unknown_to_transformers": [1, 2.50, "x"], "big": 10**30, "tiny": 1e-320}
    before = json.dumps(values, indent=1)
    after = convert_with(factories.make(tmp_path / "source"), before)
    assert after == before.replace('"num_key_value_heads": 8', '"num_key_value_heads": 2')
