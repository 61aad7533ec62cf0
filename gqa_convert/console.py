"""What the commands print, with rich: tables for people, a progress bar, one line a minute off a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNWRAPPED = 10_000


@dataclass
class Talking:
    """How much the commands say beside their results: nothing if `quiet`, libraries' own messages if `verbose`."""

    quiet: bool = False
    verbose: bool = False


_TALKING = Talking()


def talking() -> Talking:
    """How much this process says; see `speak`."""
    return _TALKING


def speak(*, quiet: bool, verbose: bool) -> None:
    """Set how much this process says from now on."""
    _TALKING.quiet, _TALKING.verbose = quiet, verbose


def note(text: str) -> None:
    """Print a line beside the results, on standard error, unless the user wants quiet."""
    if not _TALKING.quiet:
        plain_console(stderr=True, soft_wrap=True).print(text, highlight=False)


def console() -> Console:
    """The console for results; where it is no terminal nothing is wrapped, so that paths and lines stay whole."""
    return plain_console() if sys.stdout.isatty() else plain_console(soft_wrap=True, width=_UNWRAPPED)


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: paths and names may hold what rich takes for markup (`out[red]`, `:ok:`)."""
    return Console(markup=False, emoji=False, **options)


def show_written(out: Console, rest: object) -> None:
    """Print `wrote` and what was written."""
    out.print(Text.assemble(("wrote", "bold green"), f" {rest}"), highlight=False)


def size(count: int) -> str:
    """Bytes with a unit: `size(1536)` is `1.5 KiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{int(amount)} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `14 min`, `5.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def key_value_table(rows: Sequence[tuple[str, str]], title: str = "") -> Table:
    """Return labels and values as a table without lines."""
    table = Table(show_header=False, box=None, title=title or None, title_justify="left", pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def wide_console() -> Console:
    """The console for wide tables; as wide as they need where no terminal limits them."""
    return plain_console() if sys.stdout.isatty() else plain_console(width=200)
