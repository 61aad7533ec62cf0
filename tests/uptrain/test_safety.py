import errno
import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from gqa_convert.errors import CheckpointError, OutputError, TrainingAborted
from gqa_convert.uptrain.checkpoints import MARKER, CheckpointStore, damage, disk_problem, open_checkpoint
from gqa_convert.uptrain.config import GuardSection
from gqa_convert.uptrain.folder import run_folder
from gqa_convert.uptrain.guards import Guards
from gqa_convert.uptrain.metrics import MetricsFile, read_metrics
from gqa_convert.uptrain.stopping import stop_on_signals


def save(store: CheckpointStore, step: int) -> Any:
    stage = store.begin(step)
    (stage / "weights").write_bytes(b"w" * (step + 1))
    return store.commit(step, {"step": step})


def test_two_whole_checkpoints_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.newest() is None
    for step in (0, 5, 10, 15):
        save(store, step)
    assert store.steps() == [10, 15]
    assert store.newest().state() == {"step": 15}
    assert open_checkpoint(tmp_path / "step-00000010").step == 10


def test_a_save_that_is_cut_short_is_no_checkpoint_and_costs_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 5)
    stage = store.begin(10)
    (stage / "weights").write_bytes(b"half")
    assert store.newest().step == 5
    store.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "unmark", "garble"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, harm: str) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    save(store, 5)
    folder = save(store, 10).folder
    weights, marker = folder / "weights", folder / MARKER
    {
        "truncate": lambda: weights.write_bytes(b"w"),
        "flip": lambda: weights.write_bytes(b"v" * 11),
        "remove": weights.unlink,
        "unmark": marker.unlink,
        "garble": lambda: marker.write_text("{"),
    }[harm]()
    told: list[str] = []
    assert store.newest(told.append).step == 5
    assert "step-00000010" in told[0]
    assert damage(folder)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    save(store, 10)  # training comes past the same step again
    assert store.newest().step == 10


def test_a_failing_disk_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        save(store, 10)
    monkeypatch.undo()
    assert store.newest().step == 5
    assert "disk is full" in str(disk_problem(OSError(errno.ENOSPC, "x"), tmp_path))


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf")), (float("nan"), float("nan"))])
def test_numbers_that_are_not_finite_stop_before_the_step(loss: float, norm: float) -> None:
    with pytest.raises(TrainingAborted, match="was not taken"):
        Guards(GuardSection()).accepts(step=3, loss=loss, norm=norm)


def test_spikes_are_skipped_and_too_many_stop() -> None:
    guards = Guards(GuardSection(spike_factor=3.0, spike_window=8, spike_limit=3))
    assert guards.accepts(step=1, loss=100.0, norm=1.0)  # nothing to compare with yet
    for step in range(2, 10):
        assert guards.accepts(step=step, loss=2.0, norm=1.0)
    assert not guards.accepts(step=10, loss=7.0, norm=1.0)
    assert guards.accepts(step=11, loss=2.1, norm=3.0)
    assert not guards.accepts(step=12, loss=2.0, norm=100.0)
    again = Guards(GuardSection(spike_factor=3.0, spike_window=8, spike_limit=3))
    again.restore(json.loads(json.dumps(guards.state())))
    assert not again.accepts(step=13, loss=9.0, norm=1.0)
    with pytest.raises(TrainingAborted, match="3 steps in a row"):
        again.accepts(step=14, loss=9.0, norm=1.0)
    assert (guards.skipped, again.skipped) == (2, 4)


def test_no_factor_no_spikes() -> None:
    guards = Guards(GuardSection(spike_factor=None))
    assert all(guards.accepts(step=i, loss=1.0 * 10**i, norm=1.0) for i in range(80))


def test_signals_are_noted_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop
        assert stop.signal is signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) is before


class Elsewhere:
    """The engine of a process whose machine has a disk of its own."""

    is_main, processes, rank = False, 2, 1

    def from_main(self, find: Any) -> str:
        return "token of a process far away"

    def sum_of(self, value: Any) -> Any:
        return value

    def wait(self) -> None:
        pass


def test_processes_that_do_not_share_the_output_stop_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.uptrain.folder._PATIENCE", 0.0)
    with (
        pytest.raises(OutputError, match="storage that every machine sees"),
        run_folder(tmp_path, cast(Any, Elsewhere())),
    ):
        raise AssertionError("must not get here")
    (tmp_path / ".run-token of a process far away").touch()
    with run_folder(tmp_path, cast(Any, Elsewhere())):
        pass


def test_metrics_forget_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 6):
        file.write("train", step, {"loss": 1.0 / step})
    with open(path, "a") as raw:
        raw.write('{"kind": "train", "st')  # killed in the middle of a line
    file.rewind(3)
    file.write("train", 4, {"loss": 0.3})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
