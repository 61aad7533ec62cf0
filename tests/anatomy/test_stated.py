"""Messages about heads name a key that the source's config.json has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gqa_convert import plan
from gqa_convert.anatomy.kv_fields import KVField
from gqa_convert.anatomy.stated import stated_heads
from gqa_convert.errors import UsageError
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config


@pytest.mark.parametrize(
    ("values", "path", "key"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "num_key_value_heads", "num_key_value_heads=8"),
        ({"num_attention_heads": 8}, "num_key_value_heads", "num_attention_heads=8"),
        ({"encoder_attention_heads": 8, "decoder_attention_heads": 8}, "x", "decoder_attention_heads=8"),
        ({"num_heads": 4, "text_config": {"num_heads": 8}}, "num_key_value_heads", "text_config.num_heads=8"),
        ({"num_heads": 8, "text_config": {"n_head": 8}}, "text_config.num_kv_heads", "text_config.n_head=8"),
        ({"num_attention_heads": 32, "n_head_kv": 8}, "num_kv_heads", "n_head_kv=8"),
    ],
)
def test_the_key_that_is_there_is_named(values: dict[str, Any], path: str, key: str) -> None:
    field = KVField(path=tuple(path.split(".")), kv_heads=8, query_heads=8)
    assert stated_heads(values, field) == f"config.json: {key}"


def test_a_default_is_called_one() -> None:
    field = KVField(path=("num_key_value_heads",), kv_heads=8, query_heads=32)
    values = {"model_type": "mistral", "num_attention_heads": 32}
    assert stated_heads(values, field) == "mistral's default, as config.json names none"


@pytest.mark.parametrize(("model_type", "key"), [("gpt2", "n_head"), ("gptj", "n_head"), ("t5", "num_heads")])
def test_groups_that_do_not_divide_are_refused_in_the_sources_own_words(
    model_type: str, key: str, tmp_path: Path
) -> None:
    tiny_model(tiny_config(model_type)).save_pretrained(tmp_path / "source")
    for groups in (3, 16):
        with pytest.raises(UsageError, match=rf"--groups {groups}: 8 query heads .*\(config\.json: {key}=8\)\. Choose"):
            plan(tmp_path / "source", groups=groups)
