"""Progress while something long goes on: bars on a terminal, a line per minute elsewhere. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gqa_convert.console import duration, plain_console, size, talking


class Pace:
    """Says when a line is due where there is no terminal: one a minute, the first at once or after a minute."""

    seconds = 60.0

    def __init__(self, *, at_once: bool = False) -> None:
        self._last = -self.seconds if at_once else time.monotonic()

    def due(self) -> bool:
        """Whether a minute has passed since this last said so."""
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True


OnBytes = Callable[[int], None]


OnLayer = Callable[[str, int, int], None]


@contextmanager
def conversion_progress(total_bytes: int, *, quiet: bool) -> Iterator[tuple[OnBytes, OnLayer]]:
    """Show layers solved and bytes written: bars on a terminal, a line a minute elsewhere, nothing if `quiet`.

    Yields:
        A function to call with bytes written since its last call, and one to call with what is being done, the number
        of layers finished and of all layers.
    """
    if quiet or talking().quiet:
        yield lambda count: None, lambda what, done, total: None
        return
    err = plain_console(stderr=True)
    if not err.is_terminal:
        yield _lines(err, total_bytes)
        return
    layers = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
    written = Progress(
        TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
    solve_task = layers.add_task("solving layers", total=None, visible=False)
    write_task = written.add_task("write", total=total_bytes)

    def on_layer(what: str, done: int, total: int) -> None:
        layers.update(solve_task, description=what, completed=done, total=total, visible=True)

    with Live(Group(layers, written), console=err, transient=True):
        yield lambda count: written.advance(write_task, count), on_layer


def _lines(err: Console, total_bytes: int) -> tuple[OnBytes, OnLayer]:
    pace, written = Pace(), 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        if pace.due():
            err.print(f"written {size(written)} of {size(total_bytes)}")

    def on_layer(what: str, done: int, total: int) -> None:
        if pace.due() or done == total:
            err.print(f"{what}: {done} of {total} layers")

    return on_bytes, on_layer


def left(started: float, done: float, total: float) -> str:
    """`, about 3 min left` by the time that what is done took; empty where nothing is done or left."""
    if not 0 < done < total:
        return ""
    return f", about {duration((time.monotonic() - started) * (total - done) / done)} left"


class Counter:
    """Progress of a count whose total may be known late."""

    def __init__(self, what: str, err: Console, progress: Progress | None) -> None:
        self._what, self._err, self._progress = what, err, progress
        self._task = progress.add_task(what, total=None) if progress is not None else None
        self._done, self._total, self._pace = 0, 0, Pace()
        self._started = time.monotonic()

    def total(self, count: int) -> None:
        """Set how many there are."""
        self._total = count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=count)

    def advance(self, count: int = 1) -> None:
        """Count some as done."""
        self._done += count
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)
        elif self._pace.due():
            self._err.print(
                f"{self._what}: {self._done} of {self._total}{left(self._started, self._done, self._total)}"
            )

    def say(self, line: str) -> None:
        """Print a line above the progress, on standard error."""
        (self._progress.console if self._progress is not None else self._err).print(line, highlight=False)


class _Silent(Counter):
    def __init__(self) -> None:
        super().__init__("", plain_console(quiet=True), None)


@contextmanager
def counting(what: str, *, quiet: bool) -> Iterator[Counter]:
    """A bar on a terminal, one line a minute elsewhere, nothing if `quiet`."""
    if quiet or talking().quiet:
        yield _Silent()
        return
    err = plain_console(stderr=True)
    if not err.is_terminal:
        yield Counter(what, err, None)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        yield Counter(what, err, progress)
