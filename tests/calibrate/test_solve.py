from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert.calibrate import activations, session
from gqa_convert.calibrate.report import BlockReport
from gqa_convert.calibrate.solve import SolvedLayers, solve
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.operations import pool_of
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.conversion.tensors import pooled_tensor
from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.hf.loading import Source
from tests import factories
from tests.calibrate.conftest import Case

FAST = Recipe(method="pca", grouping="search", fold=True, max_context=32, calibrate="text", refit_tokens=64)
REFIT = Recipe(**{**vars(FAST), "refit": True, "refit_steps": 30})


def solved(example: Any, recipe: Recipe, inputs: Any, work: Path, **options: Any) -> SolvedLayers:
    source, anatomy = example.saved.checkpoint, example.anatomy
    return solve(source, anatomy, example.blocks, example.freedom, recipe, inputs, work=work, **options)


def state(result: SolvedLayers) -> dict[str, torch.Tensor]:
    return {name: result.tensor(name) for name in result.names}


def loss(example: Any, result: SolvedLayers, tokens: torch.Tensor) -> float:
    """Mean square difference of the logits from the source's."""
    with torch.no_grad():
        wanted = example.saved.model(tokens, use_cache=False).logits
        return float((example.converted(state(result))(tokens, use_cache=False).logits - wanted).square().mean())


def test_mean_is_the_conversion_that_pools(case: Callable[..., Case], work: Path) -> None:
    example = case("qwen2")
    result = solved(example, Recipe(), None, work)
    for merge in example.anatomy.merges:
        checkpoint = example.saved.checkpoint
        pooled = pooled_tensor(checkpoint, pool_of(checkpoint.tensors[merge.key], merge, Recipe()))
        torch.testing.assert_close(result.tensor(merge.name), pooled)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_model_that_computes_what_is_not_finite_is_refused(
    key: str, case: Callable[..., Case], tokens: torch.Tensor, work: Path, tmp_path: Path
) -> None:
    example = case("llama")
    folder = tmp_path / "damaged"
    shutil.copytree(example.saved.checkpoint.folder, folder)
    factories.change_tensors(folder, lambda tensors: tensors[key].fill_(float("nan")))
    source = Source(checkpoint=Checkpoint.open(folder), config=example.saved.config)
    anatomy = replace(example.anatomy, source=source)
    with pytest.raises(CheckpointError, match="not finite"):
        solve(source.checkpoint, anatomy, example.blocks, example.freedom, FAST, tokens, work=work)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "mixtral", "gpt2", "opt"])
def test_a_refit_is_far_better_than_the_mean_for_any_family(
    model_type: str, case: Callable[..., Case], tokens: torch.Tensor, work: Path
) -> None:
    example = case(model_type)
    recipe = REFIT if example.freedom.permutable else Recipe(**{**vars(REFIT), "grouping": "contiguous"})
    mean = loss(example, solved(example, Recipe(), None, work), tokens)
    refitted = solved(example, recipe, tokens, work)
    assert loss(example, refitted, tokens) < 0.6 * mean
    assert [report.module for report in refitted.reports] == [names.module for names in example.blocks]
    for report in refitted.reports:
        assert report.error_after is not None
        assert report.error_before is not None
        assert report.error_after < report.error_before
        assert report.seconds > 0


def test_each_step_is_worth_its_while(case: Callable[..., Case], tokens: torch.Tensor, work: Path) -> None:
    example = case("llama")
    fast, refit = (Recipe(**{**vars(recipe), "grouping": "contiguous"}) for recipe in (FAST, REFIT))
    plain = loss(example, solved(example, fast, tokens, work), tokens)
    least_squares = Recipe(**{**vars(refit), "refit_steps": 0})
    assert loss(example, solved(example, least_squares, tokens, work), tokens) < plain
    assert loss(example, solved(example, refit, tokens, work), tokens) < plain


def test_o_proj_stays_as_it_is_where_nothing_better_is_found(
    case: Callable[..., Case], tokens: torch.Tensor, work: Path
) -> None:
    """A layer that its positions tell nothing new about keeps the merged o_proj: refitting never worsens it."""
    example = case("llama")
    plain = loss(example, solved(example, FAST, tokens, work), tokens)
    least_squares = Recipe(**{**vars(REFIT), "refit_steps": 0})
    assert loss(example, solved(example, least_squares, tokens, work), tokens) <= plain


def test_a_grouped_source(case: Callable[..., Case], tokens: torch.Tensor, work: Path) -> None:
    example = case("mistral", 2, num_kv_heads=4)
    result = solved(example, REFIT, tokens, work)
    assert result.tensor("model.layers.0.self_attn.k_proj.weight").shape[0] == 2 * example.anatomy.head_dim
    assert all((report.error_after or 1) < (report.error_before or 0) for report in result.reports)


class Interruption(Exception):
    """What a user's Ctrl-C would be."""


def test_an_interrupted_run_goes_on_to_the_same_bits(
    case: Callable[..., Case], tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = case("llama", num_layers=3)
    straight = solved(example, REFIT, tokens, tmp_path / "straight")

    def stop(what: str, done: int, total: int) -> None:
        if done == 2 and what.startswith("refitting"):
            raise Interruption

    with pytest.raises(Interruption):
        solved(example, REFIT, tokens, tmp_path / "stopped", on_layer=stop)
    told: list[str] = []
    resumed = solved(example, REFIT, tokens, tmp_path / "stopped", on_layer=lambda what, done, total: told.append(what))
    assert told.count("resuming") == 2
    first, second = state(straight), state(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    monkeypatch.setattr(session, "open_parts", None)  # nothing is left to run
    again = solved(example, REFIT, tokens, tmp_path / "stopped")
    assert [r.error_after for r in again.reports] == [r.error_after for r in straight.reports]


def test_moments_serve_another_method_and_number_of_groups(
    case: Callable[..., Case], tokens: torch.Tensor, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = solved(case("llama", 2), FAST, tokens, work)
    monkeypatch.setattr(session, "LayerStream", None)  # running anything would fail
    second = solved(case("llama", 4), Recipe(**{**vars(FAST), "method": "aligned", "fold": False}), tokens, work)
    assert first.reports[0].key_residual is not None
    assert first.reports[0].key_residual > (second.reports[0].key_residual or 0)
    assert len(list(work.glob("moments-*"))) == 1


def test_other_text_is_other_work(case: Callable[..., Case], tokens: torch.Tensor, work: Path) -> None:
    example = case("llama")
    solved(example, FAST, tokens, work)
    solved(example, FAST, tokens.flip(0), work)
    assert len(list(work.glob("moments-*"))) == len(list(work.glob("layers-*"))) == 2


def test_spilling_changes_nothing(
    case: Callable[..., Case], tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = case("llama")
    plain = state(solved(example, REFIT, tokens, tmp_path / "a"))
    monkeypatch.setattr(activations, "_SMALL", 1)
    mapped = []
    original = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **named: mapped.append(1) or original(*args, **named))
    spilled = state(solved(example, REFIT, tokens, tmp_path / "b", activation_bytes=0))
    assert len(mapped) > 40
    assert all(torch.equal(plain[name], spilled[name]) for name in plain)


def test_bfloat16_layers(case: Callable[..., Case], tokens: torch.Tensor, work: Path) -> None:
    example = case("llama")
    result = solved(example, REFIT, tokens, work, dtype=torch.bfloat16)
    assert all((report.error_after or 1) < (report.error_before or 0) for report in result.reports)
    assert {tensor.dtype for tensor in state(result).values()} == {torch.float32}


def test_norms_over_all_heads_are_pooled_too(case: Callable[..., Case], tokens: torch.Tensor, work: Path) -> None:
    example = case("olmo2")
    result = solved(example, Recipe(method="pca", calibrate="text"), tokens, work)
    name = "model.layers.0.self_attn.k_norm.weight"
    expected = example.saved.model.get_parameter(name).view(2, 4, -1).mean(1).flatten()
    torch.testing.assert_close(result.tensor(name), expected)


def test_a_fold_needs_a_context(case: Callable[..., Case], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.calibrate.session.max_positions", lambda config: None)
    with pytest.raises(UsageError, match="--max-context"):
        solved(case("llama"), Recipe(method="pca", fold=True), None, work)


def test_a_report_survives_its_file() -> None:
    report = BlockReport(
        module="a", grouping=((0, 2), (1, 3)), key_residual=0.1, value_residual=None, error_before=0.5, seconds=2.0
    )
    assert BlockReport.from_json(report.to_json()) == report
    assert report.error_after == 0.5
    assert BlockReport(module="a", grouping=((0,),), key_residual=None, value_residual=None).error_after is None
