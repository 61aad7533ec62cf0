"""Progress while something long goes on: bars on a terminal, a line per minute elsewhere. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gqa_convert.console import duration, plain_console, size, talking


class Pace:
    """Says when a line is due where there is no terminal: one a minute, the first at once or after a minute."""

    seconds = 60.0

    def __init__(self, *, at_once: bool = False) -> None:
        self._last = -self.seconds if at_once else time.monotonic()

    def restart(self) -> None:
        """Let the next line wait for a minute."""
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether a minute has passed since this last said so."""
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True


class Counter:
    """A count that is shown while it rises: a bar on a terminal, a line a minute elsewhere, nothing if `quiet`.

    The bar stands from `start` to `stop`, or within a `with` block; its total may be told later.

    Args:
        what: what is counted, in front of the bar.
        quiet: show nothing at all.
        in_bytes: the bar shows sizes and a speed.
        elapsed: the bar shows the time that has passed too; lines say themselves what is left.
        at_once: the first line off a terminal comes with the first count, not after a minute.
        told: called with what is counted, the count so far and the total, however quiet this is.
        line: what a line off a terminal says, of what is counted, the count so far and the total.
    """

    def __init__(
        self,
        what: str,
        *,
        quiet: bool = False,
        in_bytes: bool = False,
        elapsed: bool = False,
        at_once: bool = False,
        told: Callable[[str, int, int], None] | None = None,
        line: Callable[[str, int, int], str] | None = None,
    ) -> None:
        self._quiet = quiet or talking().quiet
        self._what = what
        self._told, self._estimates = told, not elapsed
        self._line = line or (lambda what, done, total: f"{what}: {done} of {total}")
        self._err = plain_console(stderr=True, soft_wrap=True, highlight=False)
        self._pace = Pace(at_once=at_once)
        self._done, self._total = 0, 0
        self._from, self._since = 0, time.monotonic()
        self.bar = Progress(*_columns(in_bytes, elapsed), console=self._err, transient=True)
        self._task = self.bar.add_task(what, total=None, start=False, note="")

    @property
    def on_terminal(self) -> bool:
        """Whether there is a terminal to draw a bar on."""
        return self._err.is_terminal and not self._quiet

    def start(self, total: int | None = None, done: int = 0) -> None:
        """Begin, perhaps not at nothing: an interrupted run goes on."""
        self._done = self._from = done
        self._since = time.monotonic()
        self.bar.update(self._task, completed=done)
        self.bar.start_task(self._task)
        if total is not None:
            self.total(total)
        if self.on_terminal:
            self.bar.start()

    def total(self, count: int) -> None:
        """Set how many there are."""
        if count != self._total:
            self._from, self._since = self._done if self._done < count else 0, time.monotonic()
        self._total = count
        self.bar.update(self._task, total=count)

    def begin_now(self) -> None:
        """Count time from now on: until now it was something else that took it."""
        self._from, self._since = self._done, time.monotonic()
        self._pace.restart()

    def advance(self, count: int = 1) -> None:
        """Count some as done."""
        self.reach(self._done + count)

    def reach(self, done: int, note: str = "", *, what: str = "", last: bool = False) -> None:
        """Set how many are done.

        Args:
            done: of the total.
            note: stands behind the bar.
            what: what is counted now, in front of it.
            last: off a terminal, let the last count have a line whenever it comes.
        """
        self._done, self._what = done, what or self._what
        if self._told is not None:
            self._told(self._what, done, self._total)
        if self.on_terminal:
            self.bar.start_task(self._task)
            self.bar.update(self._task, completed=done, note=note, description=self._what)
        elif self._pace.due() or (last and done == self._total):
            self.say(self._line(self._what, done, self._total) + self._left())

    def _left(self) -> str:
        """`, about 3 min left` by the time that what was done took; empty where nothing is done or left."""
        done = self._done - self._from
        if not self._estimates or done <= 0 or self._done >= self._total:
            return ""
        return f", about {duration((time.monotonic() - self._since) * (self._total - self._done) / done)} left"

    def say(self, text: str) -> None:
        """Print a line above the bar, on standard error."""
        if not self._quiet:
            self._err.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Take the bar away."""
        if self.on_terminal:
            self.bar.stop()

    def __enter__(self) -> Counter:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _columns(in_bytes: bool, elapsed: bool) -> list[ProgressColumn]:
    counted = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    return [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counted,
        *([TimeElapsedColumn()] if elapsed else []),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]


WRITING_TEXT = "writing calibration text"
"""What `OnLayer` is told while windows are counted, not layers."""


def _solving(what: str, done: int, total: int) -> str:
    return f"{what}: {done} of {total} {'windows' if what == WRITING_TEXT else 'layers'}"


OnBytes = Callable[[int], None]


OnLayer = Callable[[str, int, int], None]


@contextmanager
def conversion_progress(total_bytes: int, *, quiet: bool) -> Iterator[tuple[OnBytes, OnLayer]]:
    """Show layers solved and bytes written, each as a `Counter` does.

    Yields:
        A function to call with bytes written since its last call, and one to call with what is being done, the number
        of layers finished and of all layers.
    """
    layers = Counter("solving layers", quiet=quiet, line=_solving)
    written = Counter(
        "writing", quiet=quiet, in_bytes=True, line=lambda what, done, total: f"written {size(done)} of {size(total)}"
    )
    written.total(total_bytes)
    live = Live(written.bar, transient=True, console=written.bar.console)

    def on_layer(what: str, done: int, total: int) -> None:
        live.update(Group(layers.bar, written.bar))
        layers.total(total)
        layers.reach(done, what=what, last=True)
        written.begin_now()  # by then what it counts has not begun

    with live if written.on_terminal else nullcontext():
        yield written.advance, on_layer
