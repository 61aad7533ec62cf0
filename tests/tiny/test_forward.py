"""Cached and full forward passes of tiny models."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from gqa_convert.tiny.forward import cache_head_counts, cached_logits, difference, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "jamba", "t5gemma", "bamba", "kyutai_speech_to_text"])
def test_cached_decode_equals_the_full_forward_pass(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type, num_kv_heads=2))
    inputs = text_inputs(model)
    full = logits(model, inputs)
    stepped, cache = cached_logits(model, inputs)
    assert full.std() > 0.3
    assert difference(full, stepped) < 1e-5
    assert set(cache_head_counts(cache)) == {2}


def test_a_wrong_cache_would_show() -> None:
    model = tiny_model(tiny_config("llama"))
    inputs = text_inputs(model)
    full = logits(model, inputs)
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.01)
    assert difference(full, logits(model, inputs)) > 1e-4


def test_head_counts_of_every_kind_of_cache() -> None:
    states = torch.zeros(1, 3, 2, 4)
    dynamic, static = DynamicCache(), StaticCache(config=tiny_config("llama"), max_cache_len=8)
    dynamic.update(states, states, 0)
    static.update(states, states, 0)
    assert cache_head_counts(dynamic) == [3]
    assert cache_head_counts(static) == [3]
    assert cache_head_counts(EncoderDecoderCache(dynamic, DynamicCache())) == [3]
    assert cache_head_counts(None) == []


def test_difference_is_relative_to_scale() -> None:
    a = torch.tensor([0.0, 100.0])
    assert difference(a, a + 1) == pytest.approx(1 / 101)
    assert difference(a, a) == 0.0
