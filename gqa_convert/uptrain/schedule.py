"""Learning rates as pure functions of tokens seen: nothing to save, nothing that runs faster with more processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gqa_convert.uptrain.config import ScheduleSection


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run.

    Attributes:
        settings: kind and constants.
        total_tokens: of the run.
        batch_tokens: of a step (inverse_sqrt counts in steps).
    """

    settings: ScheduleSection
    total_tokens: int
    batch_tokens: int

    @property
    def warmup_tokens(self) -> float:
        """Tokens of the linear warm-up."""
        return self.settings.warmup_tokens or self.settings.warmup_fraction * self.total_tokens

    def __call__(self, tokens: int) -> float:
        """Learning rate of the step that ends when `tokens` have been seen."""
        return self.settings.peak * self._shape(tokens) * self._warmup(tokens)

    def _warmup(self, tokens: int) -> float:
        return min(1.0, tokens / self.warmup_tokens) if self.warmup_tokens else 1.0

    def _shape(self, tokens: int) -> float:
        s = self.settings
        if s.kind == "constant":
            return 1.0
        if s.kind == "inverse_sqrt":
            return 1.0 / math.sqrt(max(s.start_step + tokens / self.batch_tokens, s.offset))
        floor = s.final_fraction
        start = self.total_tokens * (1 - s.decay_fraction) if s.kind == "wsd" else self.warmup_tokens
        share = _between(tokens, start, float(self.total_tokens))
        left = 0.5 * (1 + math.cos(math.pi * share)) if s.kind == "cosine" else 1 - share
        return floor + (1 - floor) * left


def _between(value: float, start: float, end: float) -> float:
    return 1.0 if end <= start else min(1.0, max(0.0, (value - start) / (end - start)))
