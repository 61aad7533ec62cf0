"""What a step must pass before it is taken: finite numbers, and no spike."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from gqa_convert.errors import TrainingAborted
from gqa_convert.uptrain.config import GuardSection


class Guards:
    """Judges each step by its loss and gradient norm. Its memory is part of a checkpoint."""

    def __init__(self, settings: GuardSection) -> None:
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._norms: deque[float] = deque(maxlen=settings.spike_window)
        self.skipped_in_a_row = 0
        self.skipped = 0

    def accepts(self, *, step: int, loss: float, norm: float) -> bool:
        """Say whether to take the step; False skips it.

        Raises:
            TrainingAborted: if a number is not finite, or too many steps in a row were spikes.
        """
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise TrainingAborted(
                    f"step {step}: the {name} is {value}; the step was not taken. The last checkpoint is from before "
                    "it. Lower schedule.peak, use train.precision float32, or look at the data of this step."
                )
        if not self._is_spike(loss, norm):
            self._losses.append(loss)
            self._norms.append(norm)
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self._settings.spike_limit:
            raise TrainingAborted(
                f"step {step}: {self.skipped_in_a_row} steps in a row were spikes (loss {loss:.3g}, gradient norm "
                f"{norm:.3g}; medians {median(self._losses):.3g}, {median(self._norms):.3g}). Training has diverged: "
                "go back to an earlier checkpoint with a lower schedule.peak, or raise guards.spike_factor."
            )
        return False

    def _is_spike(self, loss: float, norm: float) -> bool:
        factor = self._settings.spike_factor
        if factor is None or len(self._losses) < self._settings.spike_window // 4:
            return False
        # Gradient norms vary more than losses do from step to step.
        return loss > factor * median(self._losses) or norm > factor * factor * median(self._norms)

    def state(self) -> dict[str, Any]:
        """JSON-ready memory."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_a_row": self.skipped_in_a_row,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the memory of a checkpoint."""
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self.skipped_in_a_row, self.skipped = state["in_a_row"], state["skipped"]
