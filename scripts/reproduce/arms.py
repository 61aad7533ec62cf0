"""What is compared: where a run starts, what it minimises, and for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One uptraining.

    Attributes:
        start: `control` (the original, not converted), a merge method, or the preset `best`.
        groups: `gqa` or `mqa`; empty for the control.
        objective: `ce` (the pretraining's own) or `kd` (KL from the original, nothing else).
        alpha: share of the pretraining at which it ends.
    """

    start: str
    groups: str = ""
    objective: str = "ce"
    alpha: float

    @property
    def name(self) -> str:
        """For folders and tables."""
        return "-".join(part for part in (self.start, self.groups, self.objective) if part)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


PAPER = (
    Arm(start=CONTROL, alpha=0.1),
    Arm(start="mean", groups="gqa", alpha=0.1),
    Arm(start="mean", groups="mqa", alpha=0.1),
    Arm(start="first", groups="mqa", alpha=0.05),
    Arm(start="random", groups="mqa", alpha=0.05),
)

OURS = (
    Arm(start="best", groups="mqa", objective="kd", alpha=0.05),
    Arm(start="best", groups="gqa", objective="kd", alpha=0.05),
    Arm(start="best", groups="mqa", alpha=0.05),
    Arm(start="pca", groups="mqa", alpha=0.05),
    Arm(start="mean", groups="mqa", objective="kd", alpha=0.05),
    Arm(start="aligned", groups="mqa", alpha=0.05),
    Arm(start="best", groups="gqa", alpha=0.05),
)

ARMS = PAPER + OURS
CALIBRATED = ("aligned", "pca", "best")
PRESETS = ("best",)
