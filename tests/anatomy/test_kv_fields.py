"""Where a configuration says how many KV heads its decoder has, and how that is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from gqa_convert.anatomy.kv_fields import KVField, apply_edits, check_groups, config_edits, find_kv_fields
from gqa_convert.errors import UnsupportedModelError, UsageError
from tests import factories
from tests.factories import FAMILIES, HEADS, SIZES


def fields_of(config: Any) -> tuple[KVField, ...]:
    return find_kv_fields(config, json.loads(config.to_json_string()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one_main_field(family: str) -> None:
    kind = FAMILIES[family]
    (main,) = fields_of(kind.make_config())
    if kind.special is None:
        assert main.name == kind.kv_field
    assert (main.kv_heads, main.query_heads) == (HEADS, HEADS)


def test_an_absent_key_means_what_the_class_says() -> None:
    """Not every class reads an absent key as MHA: most default to a number of their own."""
    values: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    assert fields_of(transformers.LlamaConfig(**values))[0].kv_heads == HEADS
    assert fields_of(transformers.MistralConfig(**{**values, "num_attention_heads": 32}))[0].kv_heads == 8


def test_towers_beside_the_decoder_are_left_alone() -> None:
    config = FAMILIES["llava"].make_config()
    config.vision_config.num_key_value_heads = 2
    assert [field.name for field in fields_of(config)] == ["text_config.num_key_value_heads"]


@pytest.mark.parametrize("config", [transformers.GPT2Config(), transformers.BertConfig(), transformers.MambaConfig()])
def test_models_without_the_setting_have_no_field(config: Any) -> None:
    assert fields_of(config) == ()


def field(kv_heads: int, name: str = "num_key_value_heads") -> KVField:
    return KVField(path=(name,), kv_heads=kv_heads, query_heads=8)


def test_fields_that_are_smaller_already_stay() -> None:
    main, swa = field(8), field(2, "swa_num_key_value_heads")
    assert check_groups((main, swa), 4) == (main,)
    assert check_groups((main, swa), 1) == (main, swa)
    assert check_groups((main,), 8) == ()


@pytest.mark.parametrize("groups", [3, 6, 16])
def test_groups_must_divide_every_field(groups: int) -> None:
    with pytest.raises(UsageError, match=rf"--groups {groups}.*Choose one of 1, 2, 4, 8"):
        check_groups((field(8),), groups)
    with pytest.raises(UsageError):
        check_groups((field(6), field(4, "swa_num_key_value_heads")), 3)


class DeafConfig(transformers.PretrainedConfig):
    """Reads no number of KV heads from its JSON."""

    model_type = "deaf"

    @property
    def num_key_value_heads(self) -> int:
        return 8

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        pass


def test_an_edit_that_the_class_does_not_read_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads=4"):
        config_edits(DeafConfig(), {"num_key_value_heads": 8}, (field(8),), 4)


def test_edits_leave_the_original_alone() -> None:
    values = {"a": {"b": 1}, "c": 2}
    assert apply_edits(values, {("a", "b"): 3, ("d",): 4}) == {"a": {"b": 3}, "c": 2, "d": 4}
    assert values == {"a": {"b": 1}, "c": 2}


def test_a_copy_of_the_field_is_edited_only_where_there_is_one(tmp_path: Path) -> None:
    config = FAMILIES["dbrx"].make_config()
    values = json.loads(config.to_json_string())
    assert "num_key_value_heads" in values
    edits, edited = config_edits(config, values, fields_of(config), 2)
    assert edits == {("attn_config", "kv_n_heads"): 2, ("num_key_value_heads",): 2}
    assert (edited.attn_config.kv_n_heads, edited.num_key_value_heads) == (2, 2)
    del values["num_key_value_heads"]
    edits, edited = config_edits(config, values, fields_of(config), 2)
    assert edits == {("attn_config", "kv_n_heads"): 2}
    assert (edited.attn_config.kv_n_heads, edited.num_key_value_heads) == (2, 2)


def test_attention_configs_that_are_plain_tables() -> None:
    """Remote code may keep its attention settings as a dict."""
    settings: dict[str, Any] = {"n_heads": 8, "attn_config": {"kv_n_heads": 8, "clip_qkv": 8}}
    config = transformers.PretrainedConfig(**settings)
    assert [each.name for each in fields_of(config)] == ["attn_config.kv_n_heads"]


def test_factories_write_what_they_say(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", kv_heads=2)
    assert json.loads((source / "config.json").read_text())["num_key_value_heads"] == 2
