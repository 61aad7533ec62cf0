"""Progress is a bar on a terminal and a line a minute elsewhere, by one class for every command."""

from __future__ import annotations

import sys
import time

import pytest
from rich.console import Console

from gqa_convert import progress
from gqa_convert.uptrain.progress import Display

VALUES = {"loss": 1.5, "lr": 1e-4, "tokens_per_second": 10.0, "tokens_left": 600.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_count_off_a_terminal_is_told_once_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Counter("points") as counter:
        counter.total(9)
        for _ in range(4):
            counter.advance(2)
            clock[0] += 40.0
    assert capsys.readouterr().err.splitlines() == ["points: 6 of 9, about 40 s left"]


def test_layers_name_what_is_done_to_them_and_their_last_one_is_told(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.conversion_progress(10, quiet=False) as (_, on_layer):
        for what in ("solved", "refitted"):
            for layer in range(2):
                on_layer(what, layer + 1, 2)
    assert capsys.readouterr().err.splitlines() == ["solved: 2 of 2 layers", "refitted: 2 of 2 layers"]


def test_writing_is_timed_from_the_last_layer_on(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Hours of solving say nothing of how long the rest of the bytes will take."""
    with progress.conversion_progress(1 << 20, quiet=False) as (on_bytes, on_layer):
        on_layer("refitting", 0, 1)
        clock[0] += 7200
        on_layer("refitting", 1, 1)
        on_bytes(1 << 10)
        clock[0] += 61
        on_bytes((1 << 18) - (1 << 10))
    lines = [line for line in capsys.readouterr().err.splitlines() if "written" in line]
    assert lines == ["written 256.0 KiB of 1.0 MiB, about 3 min left"]


def test_a_training_run_tells_its_first_and_last_step(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display.start(3, 0)
        for step in range(3):
            display.step(step + 1, VALUES)
    rest = "loss 1.5000, lr 1.00e-04, 10 tokens/s, 1 min 00 s left"
    assert capsys.readouterr().err.splitlines() == [f"step {n} of 3: {rest}" for n in (1, 3)]


def test_on_a_terminal_there_are_bars_which_go_away_and_lines_which_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        progress, "plain_console", lambda **_: Console(file=sys.stderr, force_terminal=True, width=100, markup=False)
    )
    with progress.Counter("points") as counter:
        counter.total(4)
        counter.advance(3)
        counter.say("one [red] point")
    with progress.conversion_progress(2000, quiet=False) as (on_bytes, on_layer):
        on_layer("refitted", 1, 2)
        on_bytes(1000)
    with Display() as display:
        display.start(3, 1)
        display.step(2, VALUES)
    shown = capsys.readouterr().err
    for part in ("3/4", "one [red] point\n", "refitted", "1/2", "1.0/2.0 kB", "2/3", "loss 1.5000"):
        assert part in shown


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Counter("points", quiet=True) as counter:
        counter.total(1)
        counter.advance()
        counter.say("a line")
    with Display(quiet=True) as display:
        display.start(1, 0)
        display.step(1, VALUES)
    assert capsys.readouterr() == ("", "")
