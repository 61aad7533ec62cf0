"""What the contract found for a family, and how its checks are noted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gqa_convert.tiny.forward import difference

if TYPE_CHECKING:
    from torch import Tensor

SAME_FUNCTION = 1e-5  # largest difference of logits, as a share of their scale, that is float32 rounding
SAME_DECODE = 1e-4  # state-space layers round more between their parallel and their step-by-step form


@dataclass
class Record:
    """What the contract found for one family.

    `proven` if every check held, `refused` if the converter declines the family on purpose; `reason` says why not.
    `note` says what of the family was replaced to build it.
    """

    model_type: str
    proven: bool = False
    refused: bool = False
    checks: dict[str, bool] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    note: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    def check(self, name: str, held: bool, otherwise: str) -> None:
        """Note a check.

        Raises:
            Broken: with `otherwise`, if it did not hold.
        """
        self.checks[name] = held and self.checks.get(name, True)
        if not held:
            raise Broken(f"{name}: {otherwise}")

    def close(self, name: str, a: Tensor, b: Tensor, bound: float) -> None:
        """Check that two results agree within `bound` of their scale."""
        distance = difference(a, b)
        self.numbers[name] = max(float(f"{distance:.1e}"), self.numbers.get(name, 0.0))
        self.check(name, distance <= bound, f"differs by {distance:.1e} of scale")


class Broken(Exception):
    """A check did not hold."""
