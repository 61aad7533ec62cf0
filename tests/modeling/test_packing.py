"""One decoding step through sdpa: every KV head is read once, whatever the cache, and the result is eager's."""

from typing import Any

import pytest
import torch

from gqa_convert.evaluate.decode.caches import filled_cache
from gqa_convert.evaluate.models import decoder_inputs, encoder_output
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config


def step(model: Any, kind: str) -> torch.Tensor:
    cache = filled_cache(model, kind=kind, batch=2, context=5, room=3, source=6)
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        generator = torch.Generator().manual_seed(1)
        for layer in part.layers:
            layer.keys = layer.keys + torch.randn(layer.keys.shape, generator=generator)
    inputs = decoder_inputs(torch.full((2, 1), 3), encoder_output(model, 2, 6))
    logits: torch.Tensor = model(**inputs, past_key_values=cache, use_cache=True).logits
    return logits


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("family", ["t5", "bart", "umt5"])
def test_a_step_reads_each_kv_head_once(family: str, kv_heads: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(family, num_heads=4, num_kv_heads=kv_heads))
    seen: list[tuple[int, int, bool]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[1], key.shape[1], bool(kwargs.get("enable_gqa"))))
        return real(query, key, value, **kwargs)

    with torch.inference_mode():
        model.set_attn_implementation("eager")
        expected = step(model, kind)
        model.set_attn_implementation("sdpa")
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        actual = step(model, kind)
    assert seen[-4:] == [(kv_heads, kv_heads, False)] * 4  # two layers, each with its own and cross-attention
    assert torch.allclose(actual, expected, atol=1e-5)
