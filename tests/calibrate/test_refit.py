from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from gqa_convert.anatomy.block_names import BlockNames
from gqa_convert.calibrate.descent import DescentOptions, _step_calls, descend, held_out, schedule, tensor_lr
from gqa_convert.calibrate.hooks import BlockRecord, part_of, watching
from gqa_convert.calibrate.layer import corrected
from gqa_convert.calibrate.layer_stream import LayerStream
from gqa_convert.calibrate.least_squares import NormalEquations
from gqa_convert.calibrate.parts import WholeModel
from gqa_convert.calibrate.paused_forward import LayerCall
from gqa_convert.calibrate.refit import RefitOptions, refit_block
from gqa_convert.calibrate.residual import hidden_of, residual_scale, with_hidden
from gqa_convert.calibrate.solve import solve
from gqa_convert.calibrate.tokens import batches
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.errors import UsageError
from tests.calibrate.conftest import Case


def test_least_squares_finds_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, shift = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
    equations = NormalEquations()
    for _ in range(3):
        z = torch.randn(4, 10, 8, generator=generator) + 1
        equations.add(z, z @ truth.T + shift)
    start = torch.zeros(3, 8)
    weight, bias = equations.solve(start, torch.zeros(3), damping=1e-9)
    assert bias is not None
    torch.testing.assert_close(weight, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias, shift, rtol=1e-5, atol=1e-5)
    assert equations.error(weight, bias) < 1e-9
    assert equations.error(start) == pytest.approx(1.0)
    without, none = equations.solve(start, None, damping=1e-9)
    assert none is None
    assert 1e-3 < equations.error(without) < 1


def test_least_squares_error_is_the_brute_force_one() -> None:
    z, y, w, b = torch.randn(50, 8), torch.randn(50, 3), torch.randn(3, 8), torch.randn(3)
    equations = NormalEquations()
    equations.add(z, y)
    expected = float((z @ w.T + b - y).square().sum() / y.square().sum())
    assert equations.error(w, b) == pytest.approx(expected, rel=1e-5)


def test_a_step_takes_small_calls_together() -> None:
    targets = [torch.zeros(size, 4, 2) for size in (1, 2, 3, 8)]
    order = [3, 2, 1, 0]
    assert list(_step_calls(order, targets, 16)) == [0, 1, 2]  # 4 + 8 + 12 tokens
    assert list(_step_calls(order, targets, 16)) == [3]
    assert order == []
    order = [0, 3]
    assert list(_step_calls(order, targets, 0.5)) == [3]


def test_inputs_of_several_shapes_are_refitted(case: Callable[..., Case], work: Path) -> None:
    example = case("t5")
    generator = torch.Generator().manual_seed(0)
    inputs = [
        {
            "input_ids": torch.randint(4, 60, (200, source), generator=generator),
            "decoder_input_ids": torch.randint(4, 60, (200, target), generator=generator),
        }
        for source, target in ((8, 2), (8, 4), (12, 6))
    ]
    recipe = Recipe(method="pca", calibrate="text.jsonl", refit=True, refit_steps=60, refit_tokens=240)
    done = solve(example.saved.checkpoint, example.anatomy, example.blocks, example.freedom, recipe, inputs, work=work)
    assert len(done.reports) == len(example.blocks)
    befores, afters = zip(*((r.error_before, r.error_after_descent) for r in done.reports), strict=True)
    assert all(after <= before for after, before in zip(afters, befores, strict=True))
    assert sum(afters) < 0.9 * sum(befores)


def test_a_heavy_damping_keeps_what_is_there() -> None:
    z, y, w = torch.randn(50, 8), torch.randn(50, 3), torch.randn(3, 8)
    equations = NormalEquations()
    equations.add(z, y)
    torch.testing.assert_close(equations.solve(w, None, damping=1e9)[0], w)
    with pytest.raises(ValueError, match="no tokens"):
        NormalEquations().error(w)


def test_directions_without_data_keep_the_old_weights() -> None:
    z = torch.zeros(50, 4)
    z[:, :2] = torch.randn(50, 2)
    equations = NormalEquations()
    equations.add(z, torch.randn(50, 3))
    w = torch.randn(3, 4)
    torch.testing.assert_close(equations.solve(w, None, damping=1e-3)[0][:, 2:], w[:, 2:])


def test_the_schedule_rises_then_falls() -> None:
    options = DescentOptions(steps=100)
    rates = [schedule(step, options) for step in range(100)]
    assert rates.index(max(rates)) == 4
    assert max(rates) == 1
    assert rates[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_held_out_calls_are_not_trained_on() -> None:
    assert held_out(1) == ([0], [0])
    assert held_out(2) == ([0], [1])
    train, check = held_out(64)
    assert check == [60, 61, 62, 63]
    assert train == list(range(60))


def test_the_learning_rate_follows_the_size_of_the_tensor() -> None:
    options = DescentOptions()
    weight = torch.full((4, 4), 0.1)
    assert tensor_lr(weight, weight, options) == pytest.approx(0.002)
    assert tensor_lr(torch.zeros(4), weight, options) == pytest.approx(0.002)
    assert tensor_lr(weight, weight, DescentOptions(lr=1e-4)) == 1e-4
    wide = torch.full((1, 4096), 0.1)
    assert tensor_lr(wide, wide, options) == pytest.approx(0.001)


@pytest.mark.parametrize("values", [{"steps": -1}, {"tokens": 0}, {"lr": 2.0}, {"damping": 0.0}])
def test_options_that_mean_nothing(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        RefitOptions(**values)


def observed(example: Case, tokens: torch.Tensor, size: int = 4) -> tuple[BlockNames, Any, BlockRecord, Any]:
    """The last block, its module with spoilt weights, its calls and the outputs of the right one."""
    names = example.blocks[-1]
    parts = WholeModel(example.saved.source, dtype=torch.float32)
    for window in LayerStream(parts, batches(tokens, size)):
        if names.module.startswith(f"{window.path}."):
            record = BlockRecord()
            with watching(window.module, window.path, names, record=record):
                window.run()
            spoilt = deepcopy(part_of(window.module, window.path, names.module))
            generator = torch.Generator().manual_seed(3)
            for projection in (names.q, names.k, names.v, names.o):
                weight: Any = part_of(spoilt, names.module, projection).weight
                weight.data += 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
            return names, spoilt, record, window
    raise AssertionError


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gemma3_text", "gpt2"])
def test_both_steps_improve_a_spoilt_block_of_any_family(
    model_type: str, case: Callable[..., Case], tokens: torch.Tensor
) -> None:
    names, spoilt, record, _ = observed(case(model_type), tokens)
    untouched = {name: p.clone() for name, p in spoilt.named_parameters()}
    options = RefitOptions(steps=40, least_squares=True)
    state, report = refit_block(spoilt, names.module, names, record.calls, record.outputs, options)
    assert report.error_after_descent is not None
    assert report.error_after_least_squares is not None
    assert report.error_after_descent < 0.5 * report.error_before
    assert report.error_after_least_squares <= report.error_after_descent * 1.0001
    assert {name.rsplit(".", 1)[0] for name in state} == {names.q, names.k, names.v, names.o}
    for name, parameter in spoilt.named_parameters():
        assert torch.equal(parameter, untouched[name])


def test_a_little_text_is_learnt_by_heart_and_the_report_shows_it(
    case: Callable[..., Case], tokens: torch.Tensor
) -> None:
    """The error on what was fitted to tells it, which that on held-out windows alone cannot."""
    names, spoilt, record, _ = observed(case("llama"), tokens)
    _, much = refit_block(spoilt, names.module, names, record.calls, record.outputs, RefitOptions(steps=60))
    _, little = refit_block(spoilt, names.module, names, record.calls[-2:], record.outputs[-2:], RefitOptions(steps=60))
    gaps = [(r.error_after_descent or 0) / (r.error_on_fitted or 1) for r in (much, little)]
    assert all(gap > 0 for gap in gaps)
    assert gaps[1] > 1.5 * gaps[0]


def test_steps_in_bfloat16_come_as_far(
    case: Callable[..., Case], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are computed where a processor is quick in it; what is kept and what is told are float32."""
    names, spoilt, record, _ = observed(case("llama"), tokens)
    after = {}
    for quick in (False, True):
        monkeypatch.setattr("gqa_convert.calibrate.quick.has_bfloat16", lambda kind, quick=quick: quick)
        options = RefitOptions(steps=60)
        state, report = refit_block(spoilt, names.module, names, record.calls, record.outputs, options)
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        after[quick] = report.error_after_descent or 0.0
    assert after[False] != after[True]
    assert after[True] == pytest.approx(after[False], rel=0.2)


def test_least_squares_alone(case: Callable[..., Case], tokens: torch.Tensor) -> None:
    names, spoilt, record, _ = observed(case("llama"), tokens)
    options = RefitOptions(steps=0, least_squares=True)
    state, report = refit_block(spoilt, names.module, names, record.calls, record.outputs, options)
    assert report.error_after_descent is None
    assert (report.error_after_least_squares or 1) < report.error_before
    assert torch.equal(state[f"{names.q}.weight"], cast(Any, part_of(spoilt, names.module, names.q)).weight)
    assert not torch.equal(state[f"{names.o}.weight"], cast(Any, part_of(spoilt, names.module, names.o)).weight)


@pytest.mark.parametrize("options", [RefitOptions(steps=10, lr=0.5), RefitOptions(steps=0, least_squares=True)])
def test_what_cannot_be_bettered_is_kept(
    options: RefitOptions, case: Callable[..., Case], tokens: torch.Tensor
) -> None:
    """The right block has no error, and a ruinous learning rate finds nothing better."""
    example = case("llama")
    names, _, record, window = observed(example, tokens)
    right = part_of(window.module, window.path, names.module)
    state, report = refit_block(right, names.module, names, record.calls, record.outputs, options)
    assert report.error_before < 1e-10
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, example.saved.model.get_parameter(name), rtol=0, atol=1e-6)


def test_only_q_k_v_o_are_trained(case: Callable[..., Case], tokens: torch.Tensor) -> None:
    names, spoilt, record, _ = observed(case("gemma3_text"), tokens)
    norm = spoilt.q_norm.weight.clone()
    result = descend(spoilt, names.module, names, record.calls, record.outputs, DescentOptions(steps=5))
    assert result.after < result.before
    assert torch.equal(spoilt.q_norm.weight, norm)
    assert not any(p.requires_grad for p in spoilt.parameters())


def test_a_descent_is_the_same_every_time(case: Callable[..., Case], tokens: torch.Tensor) -> None:
    names, spoilt, record, _ = observed(case("llama"), tokens)
    options = RefitOptions(steps=7)
    first, _ = refit_block(spoilt, names.module, names, record.calls, record.outputs, options)
    second, _ = refit_block(spoilt, names.module, names, record.calls, record.outputs, options)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("model_type", "expected"), [("llama", 1.0), ("phi3", 1.0), ("mixtral", 1.0), ("gemma3_text", None), ("phi", None)]
)
def test_how_attention_enters_the_stream_is_found(
    model_type: str, expected: float | None, case: Callable[..., Case], tokens: torch.Tensor
) -> None:
    example = case(model_type)
    names, _, _, window = observed(example, tokens)
    assert residual_scale(window.module, window.path, names, window.calls[0]) == (
        None if expected is None else pytest.approx(expected, abs=1e-4)
    )


def given_back(target: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return target


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_target_makes_up_for_what_earlier_layers_lost(
    model_type: str, case: Callable[..., Case], tokens: torch.Tensor
) -> None:
    """With it as attention's output, a layer whose input has drifted gives what the source's gives."""
    names, _, record, window = observed(case(model_type), tokens)
    generator = torch.Generator().manual_seed(1)
    calls, lost = [], []
    for call in window.calls:
        h = hidden_of(call)
        assert h is not None
        lost.append(0.1 * torch.randn(h.shape, generator=generator))
        args, kwargs = with_hidden(call, h - lost[-1])
        calls.append(LayerCall(call.path, args, kwargs))
    targets = corrected(record.outputs, window, replace(window, calls=calls), names)
    if model_type == "gemma3_text":  # a norm follows its attention: nothing can be made up for by a sum
        assert all(torch.equal(a, b) for a, b in zip(targets, record.outputs, strict=True))
        return
    for call, drifted, target in zip(window.calls, calls, targets, strict=True):
        with torch.no_grad():
            expected = window.module(*call.args, **call.kwargs)
            with watching(window.module, window.path, names, on_output=partial(given_back, target)):
                given = window.module(*drifted.args, **drifted.kwargs)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_hidden_states_are_found_by_place_or_name() -> None:
    x = torch.randn(1, 2)
    assert hidden_of(LayerCall("", (torch.ones(1, dtype=torch.long), x), {})) is x
    assert hidden_of(LayerCall("", (), {"hidden_states": x})) is x
    assert hidden_of(LayerCall("", (1,), {})) is None
