"""Which points of a sweep are worth having, and which to take. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.metric import Figures, Metric
from gqa_convert.evaluate.metrics import QUALITY

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_SPELLED = {"loss_difference_interval": "interval", "kv_cache_bytes_per_token": "cache_bytes_per_token"}
"""Keys of a point that its JSON has always spelled otherwise than an evaluation's."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One conversion of a sweep.

    Attributes:
        name: `<variant>-g<groups>`, or `<variant>-kv<budget>` where layers may differ.
        variant: a merge method or preset.
        groups: KV heads; where layers differ, their mean, rounded up.
        groups_per_layer: KV heads of each layer, where layers differ; else empty.
        budget: the size within which layers might differ, as `--kv-budget` says it; else empty.
        status: `done` or `failed`.
        error: why it failed.
        figures: of the converted model and of the pair, by metric.
        convert_seconds: to convert.
        uptrained_tokens: tokens it was trained on after merging.
        deal: how it compares with originals whose cache is stored in fewer bits, in words; empty where not measured.
    """

    name: str
    variant: str
    groups: int
    groups_per_layer: tuple[int, ...] = ()
    budget: str = ""
    status: str
    error: str = ""
    figures: Figures = field(default_factory=dict)
    convert_seconds: float | None = None
    uptrained_tokens: int = 0
    deal: str = ""

    @property
    def mean_groups(self) -> float:
        """KV heads of a layer, on average."""
        return sum(self.groups_per_layer) / len(self.groups_per_layer) if self.groups_per_layer else self.groups

    @property
    def heads(self) -> str:
        """KV heads in a few characters: `4`, or `~2.5` where layers differ."""
        return f"~{self.mean_groups:.2g}" if self.groups_per_layer else str(self.groups)

    def value(self, metric: str) -> float | None:
        """A figure's value; None where it was not measured."""
        figure = self.figures.get(metric)
        return None if figure is None else figure.value

    @property
    def loss_difference(self) -> float | None:
        """Nats per token more than the original."""
        return self.value(QUALITY)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of `loss_difference`."""
        figure = self.figures.get(QUALITY)
        return None if figure is None else figure.interval

    @property
    def cache_bytes_per_token(self) -> float | None:
        """Measured."""
        return self.value("kv_cache_bytes_per_token")

    @property
    def cache_ratio(self) -> float | None:
        """Cache of the original's."""
        return self.value("cache_ratio")

    @property
    def time_ratio(self) -> float | None:
        """Decode time over the original's, where the cache weighs most; None where not measured."""
        return self.value("time_ratio")

    def to_json(self) -> dict[str, Any]:
        """The point as JSON values, its figures beside the rest."""
        values = asdict(self)
        del values["figures"]
        figures = metrics.to_json(self.figures, metrics.rows())
        return values | {_SPELLED.get(key, key): value for key, value in figures.items()}


def from_json(value: dict[str, Any]) -> SweepPoint:
    """Undo `SweepPoint.to_json`.

    Raises:
        ValueError: if it is no point; says which value is at fault.
    """
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    named = value | {name: value[key] for name, key in _SPELLED.items() if key in value}
    return _adapter().validate_python(named | {"figures": metrics.from_json(named, metrics.rows())})


@cache
def _adapter() -> TypeAdapter[SweepPoint]:
    from pydantic import TypeAdapter

    return TypeAdapter(SweepPoint)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to take, and why in a sentence; `name` is None if no point is within the tolerance."""

    name: str | None
    tolerance: float
    reason: str


def counted(point: SweepPoint) -> str:
    """KV heads of a point, in words."""
    if not point.groups_per_layer:
        return f"{point.groups} KV heads"
    return f"{point.mean_groups:.3g} KV heads per layer on average ({','.join(map(str, point.groups_per_layer))})"


def frontiers(points: Sequence[SweepPoint]) -> dict[str, list[str]]:
    """The frontier of every cost that a metric names: names of points, see `frontier`."""
    costs = [metric for metric in metrics.rows() if metric.frontier]
    return {metric.frontier: frontier(points, _cost(metric)) for metric in costs}


def _cost(metric: Metric) -> Callable[[SweepPoint], float | None]:
    sign = -1 if metric.better == "higher" else 1

    def cost(point: SweepPoint) -> float | None:
        value = point.value(metric.name)
        return None if value is None else sign * value

    return cost


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
    """Recommend the fewest KV heads whose loss rise is within the tolerance; the lower loss of two with as many.

    The upper bound of the 95 % interval must be within it, so that chance alone does not carry a point over.
    """
    done = [p for p in points if p.status == "done" and p.loss_difference is not None and p.interval is not None]
    within = [p for p in done if p.interval is not None and p.interval[1] <= tolerance]
    if within:
        best = min(within, key=lambda p: (p.mean_groups, p.loss_difference))
        assert best.interval is not None
        return Recommendation(
            name=best.name,
            tolerance=tolerance,
            reason=(
                f"{counted(best)} by {best.variant}: the fewest whose loss rise stays within {tolerance:g} nats "
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
