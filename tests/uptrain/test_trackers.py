"""Trackers: one curve for a run however often it was stopped, and none of them can end it."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gqa_convert.errors import UsageError
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.config import LogSection
from gqa_convert.uptrain.metrics import chosen_trackers, read_metrics
from gqa_convert.uptrain.read_config import parse_config
from gqa_convert.uptrain.step import train_step as real_step
from gqa_convert.uptrain.trackers import Trackers, run_identity, tracker_arguments


def test_each_tracker_is_told_how_to_go_on_with_its_run(tmp_path: Path) -> None:
    common: dict[str, Any] = {"output": tmp_path / "run", "project": "p", "identity": "abcd", "resumed": 10}
    assert tracker_arguments("wandb", **common) == {
        "run_name": "p", "name": "run-abcd", "id": "abcd", "resume": "allow", "dir": str(tmp_path / "run" / "trackers"),
    }  # fmt: skip
    assert tracker_arguments("trackio", **common) == {"run_name": "p", "name": "run-abcd", "resume": "allow"}
    board = {"run_name": "p", "logging_dir": str(tmp_path / "run" / "trackers")}
    assert tracker_arguments("tensorboard", **common) == {**board, "purge_step": 11}
    assert tracker_arguments("tensorboard", **{**common, "resumed": None}) == board


def test_a_run_keeps_its_identity_until_it_starts_anew(tmp_path: Path) -> None:
    first = run_identity(tmp_path / "trackers", new=True)
    assert run_identity(tmp_path / "trackers", new=False) == first
    assert run_identity(tmp_path / "trackers", new=True) != first
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert len(run_identity(blocked, new=False)) == 8


class Fake:
    """A tracker whose server goes away after `good` calls."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self, run_name: str, good: int = 99, **_: object) -> None:
        self.name, self.good = run_name, good

    def _call(self, *_: object, **__: object) -> None:
        self.good -= 1
        if self.good < 0:
            raise ConnectionError("server away")
        Fake.seen[self.name] += 1

    start = store_init_configuration = finish = _call

    def log(self, values: dict[str, float], step: int) -> None:
        sys.stdout.write("chatter")
        self._call()


def test_a_tracker_that_fails_is_dropped_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate import tracking

    Fake.seen.clear()
    monkeypatch.setattr(
        tracking,
        "LOGGER_TYPE_TO_CLASS",
        {
            "never": lambda run_name, **_: Fake("never", good=0),
            "soon": lambda run_name, **_: Fake("soon", good=3),
            "works": lambda run_name, **_: Fake("works"),
        },
    )
    told: list[str] = []
    trackers = Trackers(
        ["never", "soon", "works"], output=tmp_path, project="p", resumed=None, settings={}, tell=told.append
    )
    assert trackers.working == ["soon", "works"]
    for step in range(3):
        trackers.log({"train/loss": 1.0}, step)
    assert trackers.working == ["works"]
    trackers.close()
    assert Fake.seen == {"soon": 3, "works": 6}
    assert [line.split()[:2] for line in told] == [["tracker", "never"], ["tracker", "soon"]]
    assert capsys.readouterr().out == ""


def test_what_is_not_installed_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.uptrain.metrics.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb trackio"):
        chosen_trackers(LogSection(trackers=("wandb", "trackio")))
    assert chosen_trackers(LogSection()) == []


def interrupted(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that dies in its fourteenth step, with a checkpoint of the tenth, and is started again."""
    real = real_step

    def die(parts: Any, guards: Any, at: int, **rest: Any) -> Any:
        if at == 13:
            raise KeyboardInterrupt
        return real(parts, guards, at, **rest)

    settings["checkpoints"] = {"every_steps": 10}
    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        loop.uptrain(parse_config(settings), quiet=True)
    monkeypatch.undo()
    loop.uptrain(parse_config(settings), quiet=True)
    return Path(settings["output"])


def test_tensorboard_shows_every_step_once_after_a_resume(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings["log"] = {"trackers": ["tensorboard"]}
    output = interrupted(settings, monkeypatch)
    events = EventAccumulator(str(output / "trackers" / "gqa-uptrain"))
    events.Reload()
    expected = {r["step"]: r["loss"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "train"}
    shown = events.Scalars("train/loss")
    assert [event.step for event in shown] == list(range(1, 21))
    assert all(abs(event.value - expected[event.step]) < 1e-6 for event in shown)
    assert [event.step for event in events.Scalars("held_out/loss")] == [0, 20]


def run_twice(settings: dict[str, Any], write_config: Callable[..., Path], **environment: str) -> tuple[Path, str]:
    """Two legs of a run, each a process; standard output is the result's JSON and nothing else."""
    path = write_config(settings)
    for steps in (10, 20):
        done = subprocess.run(
            [sys.executable, "-m", "gqa_convert.uptrain", path, "--json", "--set", f"budget.steps={steps}"],
            env={**os.environ, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == steps
        assert "switched off" not in done.stderr
    output = Path(settings["output"])
    return output, (output / "trackers" / "run-id").read_text().strip()


@pytest.mark.slow
def test_wandb_offline_goes_on_with_one_run(
    settings: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    settings["log"] = {"trackers": ["wandb"]}
    output, identity = run_twice(
        settings, write_config, WANDB_MODE="offline", WANDB_CACHE_DIR=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path)
    )
    legs = sorted((output / "trackers" / "wandb").glob("offline-run-*"))
    assert len(legs) == 2
    assert all(leg.name.endswith(identity) for leg in legs)
    assert all((leg / f"run-{identity}.wandb").stat().st_size > 1000 for leg in legs)


@pytest.mark.slow
def test_trackio_goes_on_with_one_run(
    settings: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("trackio")
    settings["log"] = {"trackers": ["trackio"], "project": "trial"}
    output, identity = run_twice(settings, write_config, TRACKIO_DIR=str(tmp_path / "trackio"))
    asked = (
        "import json; from trackio.sqlite_storage import SQLiteStorage; import trackio\n"
        "runs = list(trackio.Api().runs('trial'))\n"
        "logs = [SQLiteStorage.get_logs('trial', run.name, run_id=run.id) for run in runs]\n"
        "print(json.dumps([[run.name, sum('train/loss' in log for log in found)] for run, found in zip(runs, logs)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[f"{output.name}-{identity}", 20]]
