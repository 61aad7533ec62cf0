"""When a run ends, and which weights its result is made of."""

import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gqa_convert.errors import Preempted, UsageError
from gqa_convert.uptrain import loop, optim, saving
from gqa_convert.uptrain.checkpoints import CheckpointStore
from gqa_convert.uptrain.config import OptimizerSection
from gqa_convert.uptrain.from_checkpoint import export_checkpoint
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import parse_config
from gqa_convert.uptrain.state import copied_state
from tests.uptrain.test_run import run, stop_after, trained

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


AVERAGING: dict[str, Any] = {"decay": 0.9, "every_steps": 2}


def ema(settings: dict[str, Any], decay: float = 0.9, every: int = 2, warmup: bool = True) -> Any:
    """The average of a run that keeps a checkpoint of every step, made anew from these."""
    value, updates = saved(settings, 0), 0
    for step in range(1, settings["budget"]["steps"] + 1):
        if step % every == 0:
            keep = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
            now = saved(settings, step)
            value = {name: x * keep + now[name] * (1 - keep) for name, x in value.items()}
            updates += 1
    return value


@pytest.mark.parametrize("warmup", [True, False])
def test_the_result_is_the_average_of_the_weights(settings: dict[str, Any], warmup: bool) -> None:
    settings["averaging"] = {**AVERAGING, "warmup": warmup}
    settings["checkpoints"] = {"every_steps": 1, "keep": 30}
    settings["budget"] = {"steps": 8}
    result = run(settings)
    final, expected = trained(settings["output"]), ema(settings, warmup=warmup)
    assert all(torch.allclose(final[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.equal(final["lm_head.weight"], saved(settings, 8)["lm_head.weight"])
    last = [r for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert last["weights"] == "averaged"
    assert result.loss_after == last["held_out_loss"] == last["held_out_loss_averaged"] != last["held_out_loss_trained"]


def test_an_average_goes_on_after_a_stop_to_the_same_bits(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["averaging"] = AVERAGING
    run({**settings, "output": settings["output"] + "-straight"})
    stop_after(monkeypatch, 7)
    with pytest.raises(Preempted):
        run(settings)
    monkeypatch.undo()
    run(settings)
    one, two = trained(settings["output"]), trained(settings["output"] + "-straight")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_averaging_leaves_what_is_trained_alone_and_can_be_kept_out_of_the_result(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["budget"] = {"steps": 6}
    run({**settings, "output": settings["output"] + "-plain"})
    settings["averaging"] = {**AVERAGING, "final": False}
    run(settings)
    plain = trained(settings["output"] + "-plain")
    assert all(torch.equal(value, plain[name]) for name, value in trained(settings["output"]).items())
    output = Path(settings["output"])
    stored = load_file(output / "checkpoints" / "step-00000006" / "average.safetensors")
    averaged = {name.removeprefix("model."): value for name, value in stored.items()}
    for weights, expected in (("trained", plain), ("averaged", averaged), ("final", plain)):
        folder, _ = export_checkpoint(output, tmp_path / weights, weights=weights)
        written = load_file(folder / "model.safetensors")
        assert all(torch.equal(value, written[name]) for name, value in expected.items())
    with pytest.raises(UsageError, match="holds no average"):
        export_checkpoint(Path(settings["output"] + "-plain"), tmp_path / "none", weights="averaged")


def test_an_average_begins_where_a_checkpoint_holds_none(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["train"]["batch_sequences"] = 2
    stop_after(monkeypatch, 5)
    with pytest.raises(Preempted):
        run(settings)
    monkeypatch.undo()
    settings["averaging"] = {"decay": 0.5, "warmup": False}
    settings["budget"] = {"steps": 6}
    settings["schedule"] = {"kind": "constant", "peak": 0.01}
    run(settings)
    expected = {n: (x + saved(settings, 6)[n]) / 2 for n, x in saved(settings, 5).items()}
    final = trained(settings["output"])
    assert all(torch.allclose(final[name], expected[name], atol=1e-6) for name in expected)


def test_the_best_checkpoint_is_told_by_its_average(worsening: dict[str, Any]) -> None:
    worsening["evaluation"]["best"] = True
    worsening["averaging"] = AVERAGING
    run(worsening)
    losses = evaluations(worsening)
    best = min(losses, key=lambda step: losses[step])
    folder = Path(worsening["output"]) / "checkpoints" / f"step-{best:08d}"
    averaged = {n.removeprefix("model."): x for n, x in load_file(folder / "average.safetensors").items()}
    final = trained(worsening["output"])
    assert all(torch.equal(final[name], value) for name, value in averaged.items())


def files_of(settings: dict[str, Any], step: int) -> Any:
    folder = Path(settings["output"]) / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".pt")}


def test_what_is_saved_beside_the_training_has_the_same_bytes(settings: dict[str, Any]) -> None:
    settings["checkpoints"] = {"every_steps": 3, "keep": 30}
    settings["averaging"] = AVERAGING
    run(settings)
    beside = {**settings, "output": settings["output"] + "-beside"}
    beside["checkpoints"] = {**settings["checkpoints"], "asynchronous": True}
    run(beside)
    for step in (0, 3, 18, 20):
        one, two = files_of(settings, step), files_of(beside, step)
        assert len(one) == 3
        assert one == two


def test_a_save_beside_the_training_that_fails_costs_the_save_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = copied_state

    def second_fails(*args: Any, **rest: Any) -> Any:
        calls.append(1)
        return full if len(calls) == 2 else real(*args, **rest)

    def full(folder: Any) -> Any:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "copied_state", second_fails)
    settings["checkpoints"] = {"every_steps": 5, "keep": 30, "asynchronous": True}
    assert run(settings).steps == 20
    folder = Path(settings["output"]) / "checkpoints"
    assert CheckpointStore(folder, 2).steps() == [0, 5, 15, 20]
    assert not list(folder.glob(".saving-*"))
    events = [r for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if r["kind"] == "event"]
    assert [r["step"] for r in events] == [10]


def test_a_run_that_is_stopped_while_it_saves_waits_for_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    real = copied_state

    def slow(*args: Any, **rest: Any) -> Any:
        write = real(*args, **rest)

        def later(folder: Any) -> Any:
            held.wait(0.3)
            write(folder)

        return later

    monkeypatch.setattr(saving, "copied_state", slow)
    stop_after(monkeypatch, 7)
    settings["checkpoints"] = {"every_steps": 6, "keep": 30, "asynchronous": True}
    with pytest.raises(Preempted):
        run(settings)
    assert CheckpointStore(Path(settings["output"]) / "checkpoints", 2).steps() == [0, 6, 7]
