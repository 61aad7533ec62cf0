"""When a run ends, and which weights its result is made of."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gqa_convert.errors import Preempted, UsageError
from gqa_convert.uptrain import loop, optim
from gqa_convert.uptrain.checkpoints import CheckpointStore
from gqa_convert.uptrain.config import OptimizerSection
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import parse_config
from tests.uptrain.test_run import run, trained

BATCH = 4 * 32


@pytest.fixture
def worsening(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its held-out loss, measured every second step, falls until step 8 and then rises."""
    settings["evaluation"] = {"every_tokens": 2 * BATCH}
    settings["budget"] = {"steps": 30}
    measured = iter(range(10**6))

    def evaluate(*_: object, **__: object) -> dict[str, float]:
        number = next(measured)
        return {"loss": 3.0 - 0.1 * number if number <= 4 else 3.0 + number, "tokens": 100.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return settings


def evaluations(settings: dict[str, Any]) -> dict[int, float]:
    records = read_metrics(Path(settings["output"]) / "metrics.jsonl")
    return {r["step"]: r["held_out_loss"] for r in records if r["kind"] == "evaluation"}


def saved(settings: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    folder = Path(settings["output"]) / "checkpoints" / f"step-{step:08d}"
    weights = load_file(folder / "model.safetensors")
    return {name.removeprefix("model."): value for name, value in weights.items()}


def test_the_result_is_the_checkpoint_of_the_lowest_held_out_loss(worsening: dict[str, Any]) -> None:
    worsening["evaluation"]["best"] = True
    worsening["checkpoints"] = {"every_steps": 1}
    result = run(worsening)
    losses = evaluations(worsening)
    best = min(losses, key=lambda step: losses[step])
    assert best == 8
    assert result.loss_after == losses[best] < losses[30]
    kept = CheckpointStore(Path(worsening["output"]) / "checkpoints", 2).steps()
    assert kept == [best, 29, 30]
    final, expected = trained(worsening["output"]), saved(worsening, best)
    assert all(torch.equal(final[name], expected[name]) for name in expected)


def test_a_run_without_progress_ends_and_stays_ended(worsening: dict[str, Any]) -> None:
    worsening["evaluation"]["patience"] = 3
    first = run(worsening)
    losses = evaluations(worsening)
    best = min(losses, key=lambda step: losses[step])
    assert first.steps == best + 3 * 2 == 14
    again = run(worsening)
    assert again.steps == first.steps
    told = json.loads((Path(worsening["output"]) / "final" / "gqa_convert.json").read_text())["uptraining"]
    assert told["held_out_loss"]["best"] == losses[best]


def test_the_clock_stops_a_run_as_a_signal_does(settings: dict[str, Any]) -> None:
    settings["train"]["max_hours"] = 1e-9
    with pytest.raises(Preempted, match="the clock"):
        run(settings)
    assert CheckpointStore(Path(settings["output"]) / "checkpoints", 2).steps() == [0, 1]
    settings["train"]["max_hours"] = 1.0
    assert run(settings).steps == 20


def test_the_result_is_the_mean_of_checkpoints(settings: dict[str, Any]) -> None:
    settings["checkpoints"] = {"every_steps": 5, "keep": 3, "average": 3}
    result = run(settings)
    final = trained(settings["output"])
    parts = [saved(settings, step) for step in (10, 15, 20)]
    for name, value in final.items():
        assert torch.allclose(value, cast(Any, sum(part[name] for part in parts)) / 3, atol=1e-6)
    assert not torch.equal(final["lm_head.weight"], parts[-1]["lm_head.weight"])
    assert result.loss_after != evaluations(settings).get(15)


def test_more_checkpoints_than_are_kept_cannot_be_averaged(settings: dict[str, Any]) -> None:
    settings["checkpoints"] = {"keep": 2, "average": 3}
    with pytest.raises(UsageError, match=r"checkpoints\.average"):
        parse_config(settings)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("decayed", [False, True])
def test_embeddings_are_decayed_only_if_that_is_asked_for(kind: str, decayed: bool) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    settings = OptimizerSection(kind=kind, weight_decay=0.1, decay_embeddings=decayed)
    optimizer = optim.make_optimizer(model, settings)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == 3
    assert decay[id(model[0].weight)] == (0.1 if decayed else 0.0)
    assert (decay[id(model[1].weight)], decay[id(model[1].bias)]) == (0.1, 0.0)
