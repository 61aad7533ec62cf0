"""What a person sees while a run goes on: a bar on a terminal, one line a minute elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gqa_convert.console import plain_console
from gqa_convert.progress import Pace


class Display:
    """Progress of a run on standard error. Only the main process has one that speaks."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = plain_console(stderr=True, soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._pace = Pace(at_once=True)
        self._total = 0

    def tell(self, text: str) -> None:
        """Say something once."""
        if not self._quiet:
            (self._progress.console if self._progress else self._console).print(text, markup=False)

    def start(self, total: int, done: int) -> None:
        """Begin counting steps."""
        self._total = total
        if self._quiet or not self._console.is_terminal:
            return
        columns = (
            TextColumn("uptraining"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
        )
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._progress.start()
        self._task = self._progress.add_task("steps", total=total, completed=done, numbers="")

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a finished step."""
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers(values))
            return
        if self._pace.due() or step == self._total:
            rate = values.get("tokens_per_second")
            left = values["tokens_left"] / rate if rate else 0.0
            self.tell(f"step {step:,} of {self._total:,}: {numbers(values)}, {_duration(left)} left")

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def numbers(values: dict[str, float]) -> str:
    """The numbers of a step in words: `loss 4.321, lr 1e-04, 12,345 tokens/s, MFU 41%`."""
    parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
