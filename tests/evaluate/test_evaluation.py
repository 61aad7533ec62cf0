import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.intervals import mean_per_token
from tests.evaluate.tiny import LINES


def direct(folder: Path, context: int, stride: int) -> tuple[float, torch.Tensor]:
    """The strided loop of the transformers documentation, one window at a time, -100 for what is not scored."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([i for line in LINES for i in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    done, total, count, rows = 0, 0.0, 0, []
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        labels = ids[None, start:end].clone()
        labels[:, : done - start] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            out = model(ids[None, start:end], labels=labels, use_cache=False)
        total, count, done = total + out.loss.item() * scored, count + scored, end
        rows.append(out.logits[0, :-1][labels[0, 1:] != -100].log_softmax(-1))
        if end == len(ids):
            break
    return total / count, torch.cat(rows)


def test_agrees_with_a_direct_loop(llama: Path, llama_gqa2: Path, lines: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    count = sum(len(tokenizer(line)["input_ids"]) + 1 for line in LINES)
    # The loop cuts its last window short where ours moves it back, so both are given windows that come out even.
    context, stride = next((c, s) for c in range(40, 60) for s in range(c // 2, 9, -1) if (count - c) % s == 0)
    evaluation = evaluate(
        llama, [llama_gqa2], EvalSettings(data=str(lines), context=context, stride=stride, batch_size=7)
    )
    base, logp = direct(llama, context, stride)
    other, logq = direct(llama_gqa2, context, stride)
    converted = evaluation.converted[0]
    assert (evaluation.tokens, evaluation.task) == (count - 1, "next token")
    assert evaluation.base.loss == pytest.approx(base, abs=1e-5)
    assert converted.model.loss == pytest.approx(other, abs=1e-5)
    assert converted.loss_difference == pytest.approx(converted.model.loss - evaluation.base.loss, abs=1e-12)
    assert converted.kl == pytest.approx(float((logp.exp() * (logp - logq)).sum(-1).mean()), abs=1e-5)
    assert converted.top1_agreement == pytest.approx(
        float((logp.argmax(-1) == logq.argmax(-1)).float().mean()), abs=1e-6
    )
    size = sum(len(line.encode()) for line in LINES)
    assert evaluation.bytes == size
    assert evaluation.base.bits_per_byte == pytest.approx(base * evaluation.tokens / math.log(2) / size, rel=1e-5)


def test_a_model_against_itself_differs_in_nothing(llama: Path, lines: Path) -> None:
    same = evaluate(llama, [llama], EvalSettings(data=str(lines))).converted[0]
    assert (same.loss_difference, same.loss_difference_interval) == (0.0, (0.0, 0.0))
    assert same.kl == pytest.approx(0.0, abs=1e-9)
    assert same.top1_agreement == 1.0


def test_cache_is_measured(llama: Path, llama_gqa2: Path, lines: Path) -> None:
    evaluation = evaluate(llama, [llama_gqa2], EvalSettings(data=str(lines), max_windows=3))
    assert evaluation.base.kv_cache_bytes_per_token == 2 * 2 * 4 * 8 * 4
    assert evaluation.to_json()["converted"][0]["cache_ratio"] == 0.5
    assert evaluation.windows == 3


def test_interval_covers_the_mean_and_is_paired() -> None:
    generator = torch.Generator().manual_seed(1)
    hard = torch.randn(200, generator=generator) * 50
    noise = torch.randn(200, generator=generator)
    tokens = [100] * 200
    difference = mean_per_token((noise + 5).tolist(), tokens)
    apart = mean_per_token((hard + noise + 5).tolist(), tokens)
    assert difference.low < 0.05 < difference.high
    assert difference.high - difference.low < 0.1 * (apart.high - apart.low)
    standard_error = float(noise.std()) / math.sqrt(200) / 100
    assert (difference.high - difference.low) / (2 * 1.96 * standard_error) == pytest.approx(1, abs=0.1)


def test_command_line(llama: Path, llama_gqa2: Path, lines: Path, tmp_path: Path) -> None:
    args = ["eval", str(llama), str(llama_gqa2), "--data", str(lines), "--max-windows", "4"]
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0, shown.output
    assert "loss rise" in shown.output
    assert "tiny-llama-gqa2" in shown.output
    finished = CliRunner().invoke(app, [*args, "--json", "--out", str(tmp_path / "eval.json")])
    printed = json.loads(finished.stdout)
    assert printed["converted"][0]["model"]["kv_heads"] == 2
    assert json.loads((tmp_path / "eval.json").read_text())["base"]["loss"] == printed["base"]["loss"]
    assert str(tmp_path) not in finished.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 128}, "made for 64 tokens"),
        ({"dtype": "int8"}, "choose one of auto"),
        ({"device": "cuda:77"}, "not available here"),
        ({"max_windows": 0}, "at least one window"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llama: Path, lines: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(llama, [], EvalSettings(data=str(lines), **change))
