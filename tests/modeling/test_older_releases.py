"""The modelling file in earlier releases of transformers: what it needs, and forms of attention that it met there."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert.modeling import modeling_gqa, shipping
from gqa_convert.tiny.forward import cache_head_counts, cached_logits, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config

FILES = ("modeling_gqa.py", "modeling_uneven.py")


def grouped(model_type: str, groups: int) -> Any:
    config = tiny_config(model_type)
    native = type(tiny_model(config))
    made = shipping.grouped_class(native)
    values = config.to_dict() | {"num_key_value_heads": groups}
    return tiny_model(made.config_class.from_dict(values), cls=made)


def test_a_forward_pass_that_computes_attention_by_itself_gets_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """XGLM's is one, as T5's was up to transformers 5.10; here nothing says so but its code."""
    named = grouped("xglm", 2)
    monkeypatch.delitem(modeling_gqa.SPREAD, "xglm")
    monkeypatch.setattr(modeling_gqa, "_grouped", {})
    model = grouped("xglm", 2)
    model.load_state_dict(named.state_dict())
    inputs = text_inputs(named)
    assert torch.equal(logits(model, inputs), logits(named, inputs))
    stepwise, cache = cached_logits(model, inputs)
    assert float((stepwise - logits(named, inputs)).abs().max()) < 1e-4
    assert set(cache_head_counts(cache)) == {2}


@pytest.mark.parametrize("file", FILES)
def test_its_least_release_is_checked_when_it_is_imported(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="4.57.6"))  # type: ignore[arg-type]
    path = Path(modeling_gqa.__file__).with_name(file)
    spec = importlib.util.spec_from_file_location("old", path)
    assert spec is not None
    assert spec.loader is not None
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=r"needs transformers 5 or later; this is 4\.57\.6") as caught:
        spec.loader.exec_module(module)
    assert "\n" not in str(caught.value)
