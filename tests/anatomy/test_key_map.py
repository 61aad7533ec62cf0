"""Raw checkpoint keys are mapped to module names the way that transformers loads them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import transformers

from gqa_convert import convert
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.hf.api import KeyMap, build_on_meta, survey
from tests import factories
from tests.factories import FAMILIES


def key_map(family: str) -> KeyMap:
    cls = getattr(transformers, FAMILIES[family].class_name)
    return KeyMap(build_on_meta(cls, FAMILIES[family].make_config()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_saved_key_finds_its_module_and_every_module_its_key(family: str, tmp_path: Path) -> None:
    mapped = key_map(family)
    names = {
        name for key in factories.shapes_of(factories.make(tmp_path / "s", family)) for name in mapped.targets(key)
    }
    assert names <= mapped.names.keys()
    tied = {"lm_head.weight"} if FAMILIES[family].make_config().tie_word_embeddings else set()
    assert mapped.names.keys() - names == tied


def test_hub_keys_of_nested_models_differ_from_their_modules() -> None:
    mapped = key_map("llava")
    raw = "language_model.model.layers.0.self_attn.k_proj.weight"
    assert raw not in mapped.names
    assert mapped.targets(raw) == ("model.language_model.layers.0.self_attn.k_proj.weight",)


def test_base_model_checkpoints_lack_the_prefix() -> None:
    mapped = key_map("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert mapped.targets("layers.0.self_attn.k_proj.weight") == (name,)
    assert mapped.targets(name) == (name,)
    assert mapped.targets("nothing.like.it") == ()


def test_without_the_private_renaming_plain_keys_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a release of transformers that has moved it."""
    real = importlib.import_module

    def moved(name: str, *rest: Any) -> Any:
        if name in ("transformers.conversion_mapping", "transformers.core_model_loading"):
            raise ImportError(name)
        return real(name, *rest)

    source = factories.make(tmp_path / "source", "llama-bias")
    expected = convert(source, groups=4, out=tmp_path / "expected").out
    nested = factories.make(tmp_path / "nested", "llava")
    monkeypatch.setattr(importlib, "import_module", moved)
    out = convert(source, groups=4, out=tmp_path / "out").out
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    with pytest.raises(UnsupportedModelError, match=rf"transformers {transformers.__version__}"):
        convert(nested, groups=4)


def test_a_config_that_the_model_refuses_is_said_so() -> None:
    config = FAMILIES["llama"].make_config()
    config.hidden_act = "no such activation"
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*no such activation"):
        build_on_meta(transformers.LlamaForCausalLM, config)


def test_building_takes_no_memory_and_leaves_the_config_alone() -> None:
    config = FAMILIES["llama"].make_config()
    before = config.to_dict()
    model = build_on_meta(transformers.LlamaForCausalLM, config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert config.to_dict() == before


def test_survey_is_of_generative_models() -> None:
    surveyed = survey()
    assert {"llama", "t5", "whisper", "llava"} <= set(surveyed)
    assert list(surveyed) == sorted(surveyed)
    assert "bert-generation" in surveyed
