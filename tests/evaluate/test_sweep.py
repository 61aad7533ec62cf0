import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.conversion.execute import execute
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.sensitivity import layer_costs
from gqa_convert.evaluate.sweep import run as sweep_module
from gqa_convert.evaluate.sweep.points import SweepPoint, from_json, frontier, recommend
from gqa_convert.evaluate.sweep.run import sweep
from gqa_convert.evaluate.sweep.settings import SweepSettings
from tests.support import Command


def point(groups: int, loss: float, high: float | None = None, variant: str = "mean") -> SweepPoint:
    identity = {"name": f"{variant}-g{groups}", "variant": variant, "groups": groups, "status": "done"}
    interval = [loss, loss if high is None else high]
    figures = {"loss_difference": loss, "interval": interval, "cache_bytes_per_token": groups * 10}
    return from_json(identity | figures | {"time_ratio": groups / 8})


POINTS = [point(4, 0.01, 0.02), point(2, 0.04, 0.06), point(2, 0.03, 0.045, "pca"), point(1, 0.3)]


@pytest.mark.parametrize(
    ("tolerance", "name"), [(0.05, "pca-g2"), (0.07, "pca-g2"), (0.02, "mean-g4"), (0.3, "mean-g1"), (0.001, None)]
)
def test_recommends_the_fewest_groups_within_the_tolerance(tolerance: float, name: str | None) -> None:
    recommended = recommend(POINTS, tolerance)
    assert recommended.name == name
    assert f"{tolerance:g}" in recommended.reason


def test_nothing_measured_is_said() -> None:
    assert recommend([SweepPoint(name="a", variant="a", groups=1, status="failed")], 1).reason.startswith("No point")


def test_frontier_leaves_out_what_is_beaten() -> None:
    assert frontier(POINTS, lambda p: p.cache_bytes_per_token) == ["mean-g1", "pca-g2", "mean-g4"]
    assert frontier([point(4, 0.1), point(2, 0.05)], lambda p: p.time_ratio) == ["mean-g2"]


def test_points_survive_json() -> None:
    assert [from_json(json.loads(json.dumps(p.to_json()))) for p in POINTS] == POINTS


def settings(lines: Path, **changes: Any) -> SweepSettings:
    defaults: dict[str, Any] = {"groups": (2, 1), "evaluation": EvalSettings(data=str(lines), max_windows=4)}
    return SweepSettings(**(defaults | {"benchmark": None} | changes))


def test_a_sweep_goes_on_where_it_stopped(
    llama: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", []
    first = sweep(str(llama), run, settings(lines, groups=(2,)), on_point=lambda p, known: seen.append((p.name, known)))
    second = sweep(str(llama), run, settings(lines), on_point=lambda p, known: seen.append((p.name, known)))
    assert seen == [("mean-g2", False), ("mean-g2", True), ("mean-g1", False)]
    assert second.points[0] == first.points[0]
    written = json.loads((run / "sweep.json").read_text())
    assert [p["name"] for p in written["points"]] == ["mean-g2", "mean-g1"]
    assert written["points"][0]["cache_ratio"] == 0.5
    layers = json.loads((run / "sensitivity.json").read_text())["layers"]
    assert [layer["layer"] for layer in layers] == ["model.layers.0", "model.layers.1"]
    seen.clear()
    other = settings(lines, groups=(2,), evaluation=EvalSettings(data=str(lines), max_windows=5))
    sweep(str(llama), run, other, on_point=lambda p, known: seen.append((p.name, known)))
    assert seen == [("mean-g2", False)], "other data or windows: measured again"
    seen.clear()
    model, text = tmp_path / "model", tmp_path / "text.jsonl"
    shutil.copytree(llama, model)
    shutil.copyfile(lines, text)
    mine = settings(text, groups=(2,), sensitivity=False)
    for change in (None, model / "model.safetensors", None, text, None):
        if change is not None:
            content = bytearray(change.read_bytes())
            content[-20] ^= 1
            change.write_bytes(content)
        sweep(str(model), tmp_path / "other", mine, on_point=lambda p, known: seen.append((p.name, known)))
    assert [known for _, known in seen] == [False, False, True, False, True], "the same names, other bytes"


@pytest.mark.parametrize("damage", ["[]", '{"fingerprint": "KEY"}', '{"fingerprint": "KEY", "point": [1]}', '{"fi'])
def test_damaged_files_are_measured_again(llama: Path, lines: Path, tmp_path: Path, damage: str) -> None:
    run, seen = tmp_path / "run", []
    mine = settings(lines, groups=(2,), sensitivity=False)
    sweep(str(llama), run, mine)
    for file in (run / "points" / "mean-g2" / "point.json", run / "base.json"):
        key = json.loads(file.read_text())["fingerprint"]
        file.write_text(damage.replace("KEY", key if file.name == "point.json" else "another"))
    sweep(str(llama), run, mine, on_point=lambda p, known: seen.append((p.name, known)))
    assert seen == [("mean-g2", False)]


def test_a_failed_point_does_not_lose_the_rest(
    llama: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = execute

    def fail_at_two(planned: Any, **rest: Any) -> object:
        if planned.groups == 2:
            raise KeyError("the disk caught fire")
        return whole(planned, **rest)

    monkeypatch.setattr(sweep_module, "execute", fail_at_two)
    swept = sweep(str(llama), tmp_path / "run", settings(lines, sensitivity=False))
    assert [p.status for p in swept.points] == ["failed", "done"]
    assert "caught fire" in swept.points[0].error
    monkeypatch.setattr(sweep_module, "execute", whole)
    again = sweep(str(llama), tmp_path / "run", settings(lines, sensitivity=False))
    assert [p.status for p in again.points] == ["done", "done"]


def test_a_budget_is_spent_where_layers_need_it(
    llama: Path, lines: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_convert.evaluate.kv_budget.WINDOWS", 2)
    run = tmp_path / "run"
    swept = command(
        "gqa", "sweep", llama, "--groups", 2, "--kv-budget", "75%,groups=2", "--data", lines, "--max-windows", 4,
        "--no-bench", "--no-sensitivity", "--out", run,
    )  # fmt: skip
    assert swept.code == 0, swept.err
    points = [from_json(p) for p in json.loads((run / "sweep.json").read_text())["points"]]
    assert [p.name for p in points] == ["mean-g2", "mean-kv75%", "mean-kvgroups-2"]
    assert sorted(points[1].groups_per_layer) == [2, 4]
    assert points[1].heads == "~3"
    assert points[1].cache_ratio == pytest.approx(0.75)
    assert points[2].cache_ratio is not None
    assert points[2].cache_ratio <= 0.5
    assert points[1].loss_difference is not None
    assert "2,4" in swept.out or "4,2" in swept.out
    reported = command("gqa", "report", run)
    assert reported.code == 0, reported.err
    page = (run / "report.html").read_text()
    assert "KV heads of each layer" in page
    assert "--kv-budget=75%,groups=2" in page.replace("&#39;", "'").replace("'", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"groups": (3,)}, "does not divide the 4 KV heads"), ({"variants": ("meen",)}, "did you mean mean")],
)
def test_what_cannot_be_swept_is_refused_first(
    llama: Path, lines: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sweep(str(llama), tmp_path / "run", settings(lines, **changes))
    assert not (tmp_path / "run").exists()


def test_one_layer_alone_costs_what_converting_it_by_hand_costs(llama: Path, llama_gqa2: Path, lines: Path) -> None:
    evaluation = EvalSettings(data=str(lines), max_windows=4)
    costs = layer_costs(llama, llama_gqa2, evaluation)
    assert [cost.layer for cost in costs] == ["model.layers.0", "model.layers.1"]
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            weight = getattr(model.model.layers[1].self_attn, name).weight
            weight.copy_(weight.view(2, 2, 8, 32).mean(1, keepdim=True).expand(2, 2, 8, 32).reshape(32, 32))
    by_hand = llama.with_name("by-hand")
    model.save_pretrained(by_hand)
    for file in llama.glob("tokenizer*"):
        (by_hand / file.name).write_bytes(file.read_bytes())
    expected = evaluate(llama, [by_hand], evaluation).converted[0].loss_difference
    assert costs[1].loss_difference == pytest.approx(expected, abs=1e-6)
    assert costs[1].interval[0] <= costs[1].loss_difference <= costs[1].interval[1]


def test_command_line(llama: Path, lines: Path, tmp_path: Path) -> None:
    args = [
        "sweep",
        str(llama),
        "--groups",
        "2",
        "--data",
        str(lines),
        "--max-windows",
        "3",
        "--out",
        str(tmp_path / "r"),
    ]
    args += ["--out", str(tmp_path / "r"), "--batch", "1", "--cache-context", "16", "--tolerance", "9"]
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0, shown.output
    assert "Take: 2 KV heads by mean" in shown.output
    assert "frontier" in shown.output
    finished = CliRunner().invoke(app, [*args, "--json"])
    assert json.loads(finished.stdout)["recommendation"]["name"] == "mean-g2"
    measured = json.loads((tmp_path / "r" / "points" / "mean-g2" / "point.json").read_text())
    assert measured["bench"]["points"][0]["models"][1]["cache_ratio"] == 0.5


UPTRAIN = """
model: replaced
output: replaced
data: {{source: {{kind: jsonl, paths: ["{data}"]}}, context: 32, held_out_fraction: 0.2, cache: "{cache}"}}
schedule: {{kind: constant, peak: 1.0e-3}}
train: {{batch_sequences: 2, precision: float32, device: cpu}}
evaluation: {{tokens: 64}}
"""


@pytest.mark.slow
def test_points_are_uptrained_before_they_are_measured(llama: Path, lines: Path, tmp_path: Path) -> None:
    config = tmp_path / "uptrain.yaml"
    config.write_text(UPTRAIN.format(data=lines, cache=tmp_path / "tokens"))
    plain = sweep(str(llama), tmp_path / "plain", settings(lines, groups=(2,), sensitivity=False))
    changes = {"groups": (2,), "uptrain_tokens": 640, "uptrain_config": config, "sensitivity": False}
    trained = sweep(str(llama), tmp_path / "run", settings(lines, **changes))
    assert trained.points[0].error == ""
    assert trained.points[0].uptrained_tokens == 640
    assert trained.points[0].loss_difference < plain.points[0].loss_difference
    assert (tmp_path / "run" / "points" / "mean-g2" / "uptrain" / "metrics.jsonl").is_file()
    config.write_text(config.read_text().replace("1.0e-3", "1.0e-9"))
    still = sweep(str(llama), tmp_path / "run", settings(lines, **changes))
    assert still.points[0].loss_difference == pytest.approx(plain.points[0].loss_difference, abs=1e-3), "trained anew"


def test_uptraining_needs_a_config(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--uptrain-config"):
        settings(lines, uptrain_tokens=10)
    with pytest.raises(UsageError, match="no such file"):
        settings(lines, uptrain_tokens=10, uptrain_config=tmp_path / "none.yaml")
