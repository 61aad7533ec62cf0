"""A conversion ends with what it cost, or says plainly that this was not measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gqa_convert import convert
from gqa_convert.cli.main import app
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.quality import Quality, estimated_seconds, measure_conversion
from tests.support import Command


def test_the_command_ends_with_the_cost_in_words(llama: Path, tmp_path: Path, command: Command) -> None:
    done = command("gqa-convert", llama, "--groups", 1, "--out", tmp_path / "one")
    assert done.code == 0
    (line,) = [line for line in done.out.splitlines() if line.startswith("quality: ")]
    assert "perplexity" in line
    assert "nats per token" in line
    assert "tokens of text that the source wrote" in line


def test_it_is_what_an_evaluation_finds(llama: Path, lines: Path, tmp_path: Path) -> None:
    result = convert(llama, groups=1, out=tmp_path / "one")
    quality = measure_conversion(result.plan, result.out, data=str(lines))
    config = json.loads((llama / "config.json").read_text())
    same = EvalSettings(data=str(lines), context=min(256, config["max_position_embeddings"]), max_windows=8)
    evaluation = evaluate(llama, [result.out], same)
    assert quality.loss_before == evaluation.base.loss
    assert quality.loss_after == evaluation.converted[0].model.loss
    assert quality.kl == evaluation.converted[0].kl
    assert quality.tokens == evaluation.tokens
    assert quality.to_json()["perplexity_after"] == pytest.approx(math.exp(quality.loss_after or 0))


def test_as_many_groups_as_heads_costs_nothing(llama: Path, tmp_path: Path) -> None:
    heads = json.loads((llama / "config.json").read_text())["num_attention_heads"]
    result = convert(llama, groups=heads, out=tmp_path / "same")
    quality = measure_conversion(result.plan, result.out)
    assert quality.rise is None
    assert quality.reason == "nothing was merged"


def test_what_would_take_long_is_not_begun_and_that_is_said(
    llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = convert(llama, groups=1, out=tmp_path / "one")
    assert "it would take about" in measure_conversion(result.plan, result.out, seconds=0.0).reason
    assert measure_conversion(result.plan, result.out, seconds=0.0, insist=True).rise is not None
    monkeypatch.setattr("gqa_convert.evaluate.quality.MEMORY_SHARE", 0.0)
    done = command("gqa-convert", llama, "--groups", 2, "--out", tmp_path / "two")
    assert "quality: not measured (both models take" in done.out
    assert f"next: gqa eval {llama} {tmp_path / 'two'} --data TEXT" in done.out


def test_it_can_be_left_out(llama: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(llama), "--groups", "1", "--out", str(tmp_path / "one"), "--no-measure", "--json"]
    assert json.loads(CliRunner().invoke(app, arguments).stdout)["quality"] is None


@pytest.mark.parametrize(
    ("rise", "words", "usable"),
    [(0.0, "as good as", True), (0.05, "close", True), (0.2, "clearly worse", False), (2.0, "not usable", False)],
)
def test_verdicts(rise: float, words: str, usable: bool) -> None:
    quality = Quality(loss_before=3.0, loss_after=3.0 + rise - 1e-9)
    assert words in quality.verdict
    assert quality.usable is usable


def test_larger_models_are_expected_to_take_longer() -> None:
    assert estimated_seconds(10**11) > 100 * estimated_seconds(10**6) > 0
