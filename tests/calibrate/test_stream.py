"""A model that is run layer by layer computes what it computes at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert.budget.machine import free_memory
from gqa_convert.calibrate.activations import Spill
from gqa_convert.calibrate.layer_stream import LayerStream
from gqa_convert.calibrate.parts import WholeModel, open_parts, streaming_fault
from gqa_convert.errors import CheckpointError, UnsupportedModelError
from gqa_convert.hf.partial import PartialModel, layer_paths
from gqa_convert.tiny.forward import difference, logits
from gqa_convert.tiny.model import text_inputs
from gqa_convert.tiny.shrink import tiny_config
from tests.calibrate.conftest import Saved

FAMILIES = {
    "llama": {},
    "qwen2": {},  # biases
    "gemma3_text": {"num_layers": 6},  # sliding and full layers, two rotary bases
    "phi3": {},  # fused projections
    "mixtral": {},  # experts stored one by one, run as one tensor
    "qwen2_moe": {},
    "mistral": {"num_kv_heads": 4},  # already grouped
    "t5": {},  # a bias that the first layer makes for all; an encoder
    "gpt_neox": {},
    "zamba2": {},  # one attention block, used by several layers
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_streamed_is_plain(model_type: str, saved: Callable[..., Saved]) -> None:
    source = saved(model_type, **FAMILIES[model_type])
    parts, notes = open_parts(source.source, dtype=torch.float32)
    assert isinstance(parts, PartialModel) == (not notes)
    inputs = [text_inputs(source.model, seed=seed, batch=2 + seed) for seed in (0, 1)]
    stream = LayerStream(parts, inputs, keep_results=True)
    paths = [window.path for window in stream]
    assert set(paths) <= set(layer_paths(source.model))
    for seen, each in zip(stream.results, inputs, strict=True):
        assert difference(seen.logits, logits(source.model, each)) < 1e-6


@pytest.mark.parametrize("model_type", FAMILIES)
def test_quicker_arithmetic_is_bfloat16s_within_and_float32_between(
    model_type: str, saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_convert.calibrate.quick.has_bfloat16", lambda kind: True)
    source = saved(model_type, **FAMILIES[model_type])
    parts, _ = open_parts(source.source, dtype=torch.float32)
    inputs = [text_inputs(source.model, seed=1, batch=2)]
    seen: dict[bool, list[torch.Tensor]] = {}
    for quick in (False, True):
        seen[quick] = []
        for window in LayerStream(parts, inputs, quick=quick):
            (out,) = window.run()
            seen[quick].append(out[0] if isinstance(out, tuple) else out)
    assert {x.dtype for x in seen[True]} == {torch.float32}
    assert 1e-6 < difference(seen[True][0], seen[False][0]) < 2e-2


def test_every_window_has_the_true_hidden_states(saved: Callable[..., Saved]) -> None:
    source = saved("llama", num_layers=3)
    inputs = [text_inputs(source.model, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        expected = [source.model(**each, use_cache=False, output_hidden_states=True).hidden_states for each in inputs]
    parts = PartialModel(source.checkpoint, source.cls, source.config, dtype=torch.float32)
    for window in LayerStream(parts, inputs):
        for call, states in zip(window.calls, expected, strict=True):
            torch.testing.assert_close(call.args[0], states[window.index], rtol=0, atol=1e-6)


def test_only_one_layer_is_in_memory(saved: Callable[..., Saved]) -> None:
    source = saved("llama", num_layers=3)
    parts = PartialModel(source.checkpoint, source.cls, source.config, dtype=torch.float32)
    for window in LayerStream(parts, [text_inputs(source.model)]):
        held = {name for name, p in parts.model.named_parameters() if "layers." in name and p.device.type != "meta"}
        assert held
        assert all(name.startswith(f"{window.path}.") for name in held)
    assert all(p.device.type == "meta" for name, p in parts.model.named_parameters() if "layers." in name)


def test_a_stand_in_does_not_change_the_course(saved: Callable[..., Saved]) -> None:
    source = saved("llama")
    inputs = [text_inputs(source.model)]
    parts = PartialModel(source.checkpoint, source.cls, source.config, dtype=torch.float32)
    stream = LayerStream(parts, inputs, keep_results=True)
    for window in stream:
        own = window.run()
        other = window.run(source.model.model.layers[1 - window.index])
        assert not torch.equal(own[0], other[0])
    assert difference(stream.results[0].logits, logits(source.model, inputs[0])) < 1e-6


def test_spilled_activations_are_the_same(saved: Callable[..., Saved], tmp_path: Path) -> None:
    source = saved("llama")
    inputs = [text_inputs(source.model, batch=16, length=24, seed=seed) for seed in (0, 1, 2)]

    def last_hidden(spill: Spill | None) -> list[Any]:
        parts = WholeModel(source.source, dtype=torch.float32)
        *_, window = LayerStream(parts, inputs, spill=spill)
        return window.run()

    kept = last_hidden(Spill(tmp_path, 16 * 24 * 64 * 4))
    for a, b in zip(kept, last_hidden(None), strict=True):
        assert torch.equal(a, b)
    assert list(tmp_path.iterdir()) == []


def test_free_memory_is_told() -> None:
    assert 1 << 20 < free_memory() < 1 << 50


def lanes() -> int:
    return sum(thread.name == "forward pass" for thread in threading.enumerate())


def test_leaving_early_ends_every_thread(saved: Callable[..., Saved]) -> None:
    source = saved("llama")
    parts = PartialModel(source.checkpoint, source.cls, source.config, dtype=torch.float32)
    stream = iter(LayerStream(parts, [text_inputs(source.model)] * 5))
    next(stream)
    assert lanes() == 5
    stream.close()
    assert lanes() == 0
    logits(source.model, text_inputs(source.model))
    assert "forward" not in vars(parts.model.model.layers[0])


def test_bfloat16(saved: Callable[..., Saved]) -> None:
    source = saved("llama")
    inputs = text_inputs(source.model)
    parts = PartialModel(source.checkpoint, source.cls, source.config, dtype=torch.bfloat16)
    stream = LayerStream(parts, [inputs], keep_results=True)
    for window in stream:
        assert {p.dtype for p in window.module.parameters()} == {torch.bfloat16}
    assert parts.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert 0 < difference(stream.results[0].logits.float(), logits(source.model, inputs)) < 0.1


def test_a_missing_weight_is_named(saved: Callable[..., Saved], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from gqa_convert.checkpoint.reader import Checkpoint

    source = saved("llama")
    tensors = load_file(source.checkpoint.folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source.checkpoint.folder / "config.json").read_text())
    parts = PartialModel(Checkpoint.open(tmp_path), source.cls, source.config, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        list(LayerStream(parts, [text_inputs(source.model)]))


def test_a_model_that_does_not_read_text_is_refused(saved: Callable[..., Saved]) -> None:
    source = saved("llama")
    parts = PartialModel(source.checkpoint, source.cls, source.config, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="cannot be run on text alone"):
        list(LayerStream(parts, [{"pixel_values": torch.zeros(1)}]))


def test_a_family_that_cannot_be_streamed_is_held_whole(
    saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("llama")
    monkeypatch.setattr("gqa_convert.calibrate.parts.streaming_fault", lambda cls, config: "it would not do")
    parts, notes = open_parts(source.source, dtype=torch.float32)
    assert isinstance(parts, WholeModel)
    assert "held whole in memory" in notes[0]
    stream = LayerStream(parts, [text_inputs(source.model)], keep_results=True)
    assert [window.path for window in stream] == ["model.layers.0", "model.layers.1"]
    assert difference(stream.results[0].logits, logits(source.model, text_inputs(source.model))) < 1e-6


def test_the_fault_of_a_stream_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    from gqa_convert.calibrate import layer_stream

    monkeypatch.setattr(
        layer_stream.LayerWindow, "run", lambda window, module=None: [call.args[0] for call in window.calls]
    )
    assert "off by" in (streaming_fault(LlamaForCausalLM, tiny_config("llama")) or "")
