"""What is known of each attention block after solving. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OnLayer = Callable[[str, int, int], None]
"""Called with what is being done, the number of layers finished, and of all layers."""


POOR = 0.25
"""A refitted block whose mean square error stays above this share is named: half of its outputs' size is missing."""

BY_HEART = 0.6
"""Blocks whose error on the text that they were fitted to is below this share of that on other text have learnt it."""


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """One attention block: what merging it lost, and what refitting it won back."""

    module: str
    """Path of the attention module."""
    grouping: tuple[tuple[int, ...], ...]
    """Source KV heads of each group."""
    key_residual: float | None
    """Lost share of the variance of the scores; None for methods that do not measure it."""
    value_residual: float | None
    """Lost share of the heads' contributions to the output."""
    error_before: float | None = None
    """Mean square error of the outputs on held-out windows, as a share of their mean square; None without refit."""
    error_after_descent: float | None = None
    """The same after training the block; None if it was not trained."""
    error_after_least_squares: float | None = None
    """The same after solving for o_proj; None if that was not done."""
    error_on_fitted: float | None = None
    """The same on the windows that the block was trained on; None if it was not trained."""
    seconds: float = 0.0
    """Time spent on the block."""

    @property
    def error_after(self) -> float | None:
        """Error of what was kept."""
        errors = (self.error_before, self.error_after_descent, self.error_after_least_squares)
        return min((e for e in errors if e is not None), default=None)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BlockReport:
        """Read back what `to_json` gives."""
        return cls(**{**values, "grouping": tuple(tuple(group) for group in values["grouping"])})

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def poor_blocks_line(reports: Sequence[BlockReport]) -> str | None:
    """Name the refitted blocks that stay far from the original's, worst first, and what helps; None if none does."""
    poor = sorted(
        ((report.error_after, report.module) for report in reports if (report.error_after or 0.0) > POOR), reverse=True
    )
    if not poor:
        return None
    shown = ", ".join(f"{module} {error:.0%}" for error, module in poor[:_SHOWN])
    more = f" and {len(poor) - _SHOWN} more" if len(poor) > _SHOWN else ""
    line = (
        f"far from the original after the refit (mean square error of attention's output on held-out windows): "
        f"{shown}{more}, of {len(reports)} blocks. "
    )
    known = _error_by_heart(reports)
    if known is not None:
        return line + (
            f"On the windows that they were fitted to it is {known:.0%} on average: the text was learnt by heart. More "
            "text (--calibration-sequences), more groups, or --preset heal would help."
        )
    return line + "More --refit-steps, more groups, or --preset heal would help."


def _error_by_heart(reports: Sequence[BlockReport]) -> float | None:
    """Mean error on the text that the blocks were fitted to, if it is far below that on held-out text."""
    pairs = [(r.error_on_fitted, r.error_after) for r in reports if r.error_on_fitted is not None]
    if not pairs:
        return None
    fitted, held_out = (sum(error or 0.0 for error in errors) / len(pairs) for errors in zip(*pairs, strict=True))
    return fitted if fitted < BY_HEART * held_out else None


_SHOWN = 4
