"""Which points of a sweep are worth having, and which to take. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One conversion of a sweep.

    Attributes:
        name: `<variant>-g<groups>`.
        variant: a merge method or preset.
        groups: KV heads.
        status: `done` or `failed`.
        error: why it failed.
        loss_difference: nats per token more than the original.
        interval: its 95 % bootstrap interval.
        kl: KL(original || converted), nats per token.
        top1_agreement: share of tokens.
        parameters: of the converted model.
        cache_bytes_per_token: measured.
        cache_ratio: of the original's.
        time_ratio: decode time over the original's, at the point where the cache weighs most; None where not measured.
        convert_seconds: to convert.
        uptrained_tokens: tokens it was trained on after merging.
    """

    name: str
    variant: str
    groups: int
    status: str
    error: str = ""
    loss_difference: float | None = None
    interval: tuple[float, float] | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    parameters: int | None = None
    cache_bytes_per_token: int | None = None
    cache_ratio: float | None = None
    time_ratio: float | None = None
    convert_seconds: float | None = None
    uptrained_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """The point as JSON values."""
        return asdict(self)


def from_json(value: dict[str, Any]) -> SweepPoint:
    """Undo `SweepPoint.to_json`."""
    interval = value.get("interval")
    return SweepPoint(**(value | {"interval": None if interval is None else (interval[0], interval[1])}))


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to take, and why in a sentence; `name` is None if no point is within the tolerance."""

    name: str | None
    tolerance: float
    reason: str


def frontier(points: Sequence[SweepPoint], cost: Callable[[SweepPoint], float | None]) -> list[str]:
    """Names of the points that no other beats in both cost and loss, cheapest first; points without a cost are out."""
    known = [(cost(p), p.loss_difference, p.name) for p in points if p.loss_difference is not None]
    usable = sorted((c, loss, name) for c, loss, name in known if c is not None and loss is not None)
    best, kept = float("inf"), []
    for _, loss, name in usable:
        if loss < best:
            best = loss
            kept.append(name)
    return kept


def recommend(points: Sequence[SweepPoint], tolerance: float) -> Recommendation:
    """Recommend the fewest groups whose loss rise is within the tolerance; the lower loss of two with as many groups.

    The upper bound of the 95 % interval must be within it, so that chance alone does not carry a point over.
    """
    done = [p for p in points if p.status == "done" and p.loss_difference is not None and p.interval is not None]
    within = [p for p in done if p.interval is not None and p.interval[1] <= tolerance]
    if within:
        best = min(within, key=lambda p: (p.groups, p.loss_difference))
        assert best.interval is not None
        return Recommendation(
            name=best.name,
            tolerance=tolerance,
            reason=(
                f"{best.groups} KV heads by {best.variant}: the fewest whose loss rise stays within {tolerance:g} nats "
                f"per token ({best.loss_difference:+.4f}, at most {best.interval[1]:+.4f} with 95 % confidence)."
            ),
        )
    if not done:
        return Recommendation(name=None, tolerance=tolerance, reason="No point could be measured.")
    near = min(done, key=lambda p: p.loss_difference if p.loss_difference is not None else float("inf"))
    return Recommendation(
        name=None,
        tolerance=tolerance,
        reason=(
            f"No point stays within {tolerance:g} nats per token; the nearest is {near.name} at "
            f"{near.loss_difference:+.4f}. Uptrain it, allow more groups, or accept a larger loss."
        ),
    )
