import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.intervals import mean_per_token
from gqa_convert.evaluate.metric import Compared, Figure, FromBench, Metric, OfModel, PerToken, fixed
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.text import overlapping, windows
from gqa_convert.report.card import card
from gqa_convert.report.collect import read_run
from gqa_convert.report.page import page

TOY = Metric(
    name="entropy",
    label="entropy",
    unit="nats per token",
    better="lower",
    of="model",
    compute=PerToken(lambda scores: -(scores.logp_BTV.exp() * scores.logp_BTV).sum(-1)),
    show=fixed(3),
    meaning="of the predicted distribution",
    compared=Compared(how="difference", label="entropy rise", frontier="entropy"),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Metric:
    monkeypatch.setattr(metrics, "_METRICS", dict(metrics._METRICS))
    return metrics.register(TOY)


def test_a_new_row_is_measured_and_shown_everywhere(toy: Metric, llama: Path, lines: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [*map(str, words), "--data", str(lines), "--max-windows", "4"])
        assert done.exit_code == 0, done.output
        return done.stdout

    folder = tmp_path / "run"
    sweep = ("sweep", llama, "--groups", "2", "--out", folder, "--no-bench", "--no-sensitivity", "--tolerance", 9)
    table = run(*sweep)
    converted = folder / "points" / "mean-g2" / "model"
    shown = run("eval", llama, converted)
    measured = json.loads(run("eval", llama, converted, "--json"))
    figures = measured["converted"][0]
    before, after = measured["base"]["entropy"], figures["model"]["entropy"]
    low, high = figures["entropy_difference_interval"]
    assert low <= figures["entropy_difference"] <= high
    assert figures["entropy_difference"] == pytest.approx(after - before, abs=1e-12)
    assert before == pytest.approx(entropy_by_hand(llama, lines), abs=1e-5)

    rise = f"{after - before:+.3f}"
    for text in (f"{before:.3f}", f"{after:.3f}", rise, "entropy rise", "entropy: of the predicted distribution"):
        assert text in shown
    summary = json.loads((folder / "sweep.json").read_text())
    assert summary["points"][0]["entropy_difference"] == pytest.approx(after - before, abs=1e-9)
    assert summary["frontier"]["entropy"] == ["mean-g2"]
    for text in ("entropy", "entropy rise [95 %]", f"{after:.3f}", rise):
        assert text in table
    report = read_run(folder)
    html = page(report, {})
    assert f"<td>{before:.3f}</td>" in html
    assert f"<td>{rise} [" in html
    assert f"<b>{rise}</b><span>entropy, nats per token (from {before:.3f})</span>" in html
    readme = card(report, report.points[0])
    assert f"| entropy, nats per token | {before:.3f} | {after:.3f} |" in readme
    assert f"| entropy rise | {rise} [" in readme
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "eval.json").write_text(json.dumps(measured))
    assert f"<td>{rise} [" in page(read_run(tmp_path / "loose"), {})


def entropy_by_hand(model_folder: Path, lines: Path) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    ids = torch.tensor([i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for window in windows(len(ids), context=64, stride=32, limit=4):
        with torch.no_grad():
            logits = model(ids[None, window.start : window.start + window.length - 1], use_cache=False).logits[0]
        chosen = torch.distributions.Categorical(logits=logits[window.first - 1 :].double())
        total, count = total + float(chosen.entropy().sum()), count + len(logits) - window.first + 1
    return total / count


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        metrics.register(metrics.row("kl"))
    with pytest.raises(ValueError, match="is of a model"):
        Metric(name="x", label="x", of="pair", compute=OfModel(lambda subject, model: 1), show=str)
    with pytest.raises(ValueError, match="nothing to compare"):
        Metric(
            name="x", label="x", of="pair", compute=FromBench(lambda bench: None), show=str,
            compared=Compared(how="ratio", label="y"),
        )  # fmt: skip


def test_every_row_says_what_it_is() -> None:
    names = [metric.name for metric in metrics.rows()]
    assert len(set(names)) == len(names)
    for metric in metrics.rows():
        assert metric.label
        assert metric.show(0.5)
        assert metric.better != "neither" or metric.name == "parameters"


def test_figures_survive_json_and_what_is_no_number_is_left_out() -> None:
    figures = {"loss": Figure(1.5, (1.0, 2.0)), "parameters": Figure(10), "time_ratio": Figure(0.5, None, "faster")}
    written = json.loads(json.dumps(metrics.to_json(figures, metrics.rows())))
    assert metrics.from_json(written, metrics.rows()) == figures
    hostile = {"loss": "<b>", "kl": float("nan"), "parameters": True, "perplexity": 10**400, "loss_interval": [1]}
    assert metrics.from_json(hostile, metrics.rows()) == {}


def test_an_evaluation_survives_json(llama: Path, llama_gqa2: Path, lines: Path) -> None:
    measured = evaluate(llama, [llama_gqa2], EvalSettings(data=str(lines), max_windows=3))
    assert Evaluation.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    with pytest.raises(ValueError, match="context"):
        Evaluation.from_json(measured.to_json() | {"context": "<script>"})


@pytest.mark.parametrize(("context", "stride", "block"), [(64, 64, 1), (64, 32, 2), (64, 16, 4), (64, 33, 2)])
def test_overlapping_windows_are_counted(context: int, stride: int, block: int) -> None:
    assert overlapping(windows(10_000, context=context, stride=stride)) == block
    assert overlapping(windows(10_000, context=context, stride=stride, limit=5)) == 1


def test_neighbours_that_agree_widen_the_interval() -> None:
    """Every value twice is half as much to know as it seems; drawn in blocks the interval says so."""
    draws = torch.randn(300, generator=torch.Generator().manual_seed(3)).repeat_interleave(2).tolist()
    alone, blocks = (mean_per_token(draws, [1] * 600, block=block) for block in (1, 2))
    assert blocks.value == alone.value
    # Blocks start anywhere, half of them astride: 1.5 of the variance, of the 2 that would be right.
    assert (blocks.high - blocks.low) / (alone.high - alone.low) == pytest.approx(1.5**0.5, abs=0.08)
