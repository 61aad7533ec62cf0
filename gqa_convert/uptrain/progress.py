"""What a person sees while a run goes on: a bar on a terminal, one line a minute elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from gqa_convert.progress import Counter


class Display(Counter):
    """Progress of a run on standard error. Only the main process has one that speaks."""

    def __init__(self, *, quiet: bool = False, told: Callable[[str, int, int], None] | None = None) -> None:
        self._values: dict[str, float] = {}
        super().__init__("uptraining", quiet=quiet, elapsed=True, at_once=True, line=self._step_line, told=told)

    def __enter__(self) -> Display:
        return self  # the bar comes with the first step, after what is said while the run is built

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a finished step."""
        self._values = values
        self.reach(step, numbers(values), last=True)

    def _step_line(self, _: str, step: int, steps: int) -> str:
        rate = self._values.get("tokens_per_second")
        left = self._values["tokens_left"] / rate if rate else 0.0
        return f"step {step:,} of {steps:,}: {numbers(self._values)}, {_duration(left)} left"


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
