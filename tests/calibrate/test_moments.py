from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gqa_convert.calibrate.hooks import part_of, watching
from gqa_convert.calibrate.input_statistics import InputMoments, read_statistics, statistics_store, write_statistics
from gqa_convert.calibrate.layer_stream import LayerStream
from gqa_convert.calibrate.tokens import batches
from gqa_convert.hf.partial import PartialModel
from tests.calibrate.conftest import Case


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_moments_are_those_of_the_inputs(model_type: str, case: Callable[..., Case], tokens: torch.Tensor) -> None:
    example = case(model_type)
    inputs: dict[str, list[torch.Tensor]] = {names.module: [] for names in example.blocks}
    handles = [
        part_of(example.saved.model, "", names.q).register_forward_pre_hook(
            lambda _, args, module=names.module: inputs[module].append(args[0].detach())
        )
        for names in example.blocks
    ]
    with torch.no_grad():
        example.saved.model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    parts = PartialModel(example.saved.checkpoint, example.saved.cls, example.saved.config, dtype=torch.float32)
    for window in LayerStream(parts, batches(tokens, 20)):
        (names,) = (names for names in example.blocks if names.module.startswith(f"{window.path}."))
        moments = InputMoments()
        with watching(window.module, window.path, names, on_inputs=moments.add):
            window.run()
        seen = moments.statistics()
        x = torch.cat(inputs[names.module]).flatten(0, 1).double()
        assert seen.count == len(x) == tokens.numel()
        assert seen.kv is None
        torch.testing.assert_close(seen.moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.mean, x.mean(0), rtol=1e-5, atol=1e-6)


def test_cross_attention_has_moments_of_both_inputs() -> None:
    moments = InputMoments()
    x, y = torch.randn(3, 5, 8), torch.randn(3, 7, 6)
    moments.add(x, y)
    seen = moments.statistics()
    assert seen.kv is not None
    assert (seen.count, seen.kv.count) == (15, 21)
    torch.testing.assert_close(seen.kv.moment, y.flatten(0, 1).double().T @ y.flatten(0, 1).double() / 21)


def test_nothing_added_is_an_error() -> None:
    with pytest.raises(ValueError, match="no inputs"):
        InputMoments().statistics()


def test_a_long_sum_does_not_drift() -> None:
    moments = InputMoments()
    x = torch.full((1000, 2), 1 / 3)
    for _ in range(200):
        moments.add(x, x)
    assert abs(float(moments.statistics().moment[0, 0]) - float(x[0, 0].double()) ** 2) < 1e-14


def test_statistics_come_back_from_their_file(work: Path) -> None:
    store = statistics_store(work, {"source": "a"})
    moments = InputMoments()
    moments.add(torch.randn(3, 5, 8), torch.randn(3, 7, 6))
    statistics = {"model.layers.0.cross": moments.statistics()}
    write_statistics(store, 0, statistics)
    again = read_statistics(store, 0)
    assert again is not None
    one, two = statistics["model.layers.0.cross"], again["model.layers.0.cross"]
    assert torch.equal(one.moment, two.moment)
    assert one.kv is not None
    assert two.kv is not None
    assert torch.equal(one.kv.mean, two.kv.mean)
    assert (two.count, two.kv.count) == (15, 21)
    assert read_statistics(store, 1) is None
    assert read_statistics(statistics_store(work, {"source": "b"}), 0) is None
