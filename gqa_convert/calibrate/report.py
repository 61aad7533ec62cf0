"""What is known of each attention block after solving. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OnLayer = Callable[[str, int, int], None]
"""Called with what is being done, the number of layers finished, and of all layers."""


POOR = 0.25
"""A refitted block whose mean square error stays above this share is named: half of its outputs' size is missing."""


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
    return (
        f"far from the original after the refit (mean square error of attention's output on held-out windows): "
        f"{shown}{more}, of {len(reports)} blocks. More --refit-steps, more groups, or --preset heal would help."
    )


_SHOWN = 4
