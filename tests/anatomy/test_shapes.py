"""What two builds of a model show, and what they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from gqa_convert.anatomy.anatomy import dissect
from gqa_convert.anatomy.shapes import index_of, index_split
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.hf.loading import Source
from tests import factories
from tests.factories import FAMILIES, HEADS


@pytest.mark.parametrize(
    ("family", "width"), [("llama", 8), ("llama-head-dim", 24), ("gemma", 16), ("qwen3", 16), ("phi3", 8), ("dbrx", 8)]
)
def test_head_width_is_the_models_own(family: str, width: int, tmp_path: Path) -> None:
    """Not `hidden_size / heads`, which is wrong wherever head_dim is explicit."""
    anatomy = dissect(Source.open(factories.make(tmp_path / "s", family)), 2)
    assert anatomy.head_dim == width
    weights = [merge for merge in anatomy.merges if merge.is_projection]
    assert {merge.rows.head_dim for merge in weights} == {width}
    assert {merge.rows.groups for merge in weights} == {2}


def test_what_is_kept_per_layer_but_not_per_head_is_left_alone(tmp_path: Path) -> None:
    """Qwen3's key norm has one weight of head_dim for all heads."""
    anatomy = dissect(Source.open(factories.make(tmp_path / "s", "qwen3")), 2)
    assert not [merge.key for merge in anatomy.merges if "norm" in merge.key]


@pytest.mark.parametrize(("family", "shape"), [("olmo2", (64,)), ("cohere", (8, 8)), ("stablelm", (8,))])
def test_norms_over_heads_are_merged(family: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    anatomy = dissect(Source.open(factories.make(tmp_path / "s", family)), 4)
    norms = [merge for merge in anatomy.merges if "norm" in merge.key]
    assert norms
    assert {merge.shape for merge in norms} == {shape}
    assert not any(merge.is_projection or merge.cached for merge in norms)
    assert len(anatomy.dropped) == (2 * 4 if family == "stablelm" else 0)


def test_expanding_a_small_models_state_fills_the_large_one(tmp_path: Path) -> None:
    for family in FAMILIES:
        groups = FAMILIES[family].groups[-1]
        anatomy = dissect(Source.open(factories.make(tmp_path / family, family)), groups)
        assert anatomy.difference is not None
        cls = getattr(transformers, FAMILIES[family].class_name)
        small, large = cls(FAMILIES[family].make_config(groups)), cls(FAMILIES[family].make_config(HEADS))
        state = anatomy.difference.expand(small.state_dict())
        assert {name: x.shape for name, x in state.items()} == {n: x.shape for n, x in large.state_dict().items()}


def test_a_field_that_changes_no_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may carry the field and ignore it; converting it would only write a lie into config.json."""
    source = factories.make(tmp_path / "source")
    plain = transformers.LlamaForCausalLM.__init__

    def ignore_the_field(self: Any, config: transformers.LlamaConfig) -> None:
        config.num_key_value_heads = HEADS
        plain(self, config)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", ignore_the_field)
    with pytest.raises(UnsupportedModelError, match="changes no weight"):
        dissect(Source.open(source), 4)


def test_indices_in_names() -> None:
    assert index_split("layers.1.norms.3.weight") == ("layers.1.norms", "weight")
    assert index_split("norm.weight") == ("", "norm.weight")
    assert index_of("layers.1.norms.3.weight") == 3
