"""What a row of `metrics` is: how a figure is computed, shown and compared. Imports no torch.

Shapes: B examples, T targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gqa_convert.console import size

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.evaluate.decode.results import Bench
    from gqa_convert.evaluate.models import Subject

Place = Literal["eval", "sweep", "page", "tiles", "card"]
"""eval: table of `gqa eval`; sweep: one line per point, in a terminal and on the page; page: the page's table of one
evaluation; tiles: the page's large numbers; card: the model card."""
EVERYWHERE: frozenset[Place] = frozenset(("eval", "sweep", "page", "tiles", "card"))


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        value: in the metric's unit.
        interval: its 95 % bootstrap interval, where it is a mean over tokens.
        verdict: what the value amounts to in words, where the value alone would mislead (`no difference`).
    """

    value: float
    interval: tuple[float, float] | None = None
    verdict: str = ""


Figures = dict[str, Figure]
"""Figures by the name of their metric; what was not measured is not in it."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What a model says about some tokens.

    Attributes:
        targets_BT: the tokens that come next.
        logp_BTV: the model's log-probabilities.
        original_BTV: the original's, None where the original itself is scored.
    """

    targets_BT: Tensor
    logp_BTV: Tensor
    original_BTV: Tensor | None = None

    @property
    def target_logp_BT(self) -> Tensor:
        """Log-probability of each target."""
        return self.logp_BTV.gather(-1, self.targets_BT[..., None]).squeeze(-1)


@dataclass(frozen=True)
class PerToken:
    """A mean over the scored tokens, with a bootstrap interval: `values` gives (B, T), one value per token."""

    values: Callable[[TokenScores], Tensor]


@dataclass(frozen=True)
class OfModel:
    """A property of the loaded model."""

    value: Callable[[Subject, Any], float]


@dataclass(frozen=True)
class FromFigures:
    """Follows from the same model's figures in rows above, and from the tokens and UTF-8 bytes that were scored."""

    value: Callable[[Mapping[str, Figure], int, int], float | None]


@dataclass(frozen=True)
class FromBench:
    """From the decode benchmark of original and conversion; None where nothing could be timed."""

    figure: Callable[[Bench], Figure | None]


@dataclass(frozen=True)
class Apart:
    """Measured where the user asks for it, by the module named, and not with the rest."""

    module: str


@dataclass(frozen=True)
class Against:
    """The conversion's figure `metric` set against the original's; made by `Metric.comparison`."""

    metric: str
    how: Literal["difference", "ratio"]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """How a model's figure is set against the original's.

    Attributes:
        how: `difference`: bootstrapped in pairs, window by window, where the figure is a mean over tokens; `ratio`.
        label: of the comparison, in tables with a row per metric.
        heading: the same in tables with a column per metric.
        name: key of the comparison in JSON; by default the metric's name and `how`.
        show: the compared value in words; by default as the metric's own, a difference with its sign.
        places: where the comparison is shown.
        frontier: name of the frontier that this is a cost of, see `Metric`.
    """

    how: Literal["difference", "ratio"]
    label: str
    heading: str = ""
    name: str = ""
    show: Callable[[float], str] | None = None
    places: frozenset[Place] = EVERYWHERE
    frontier: str = ""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row.

    Attributes:
        name: key in JSON.
        label: in tables with a row per metric.
        compute: how it is had.
        show: a value in words.
        of: `model`: a figure of one model; `pair`: of a conversion beside its original.
        unit: of the value; empty where `show` writes it.
        better: which way is better; `neither` where a value is neither good nor bad.
        meaning: what it is, for the small print under tables.
        heading: in tables with a column per metric; by default the label.
        compared: how a model's figure is set against the original's; None: shown as it is, beside the original's.
        brackets: show the interval too.
        interval_name: key of the interval in JSON; by default the name and `_interval`.
        places: where it is shown.
        frontier: quality is traded against this cost: gives the frontier of that name, and its plot.
    """

    name: str
    label: str
    compute: PerToken | OfModel | FromFigures | FromBench | Apart | Against
    show: Callable[[float], str]
    of: Literal["model", "pair"]
    unit: str = ""
    better: Literal["lower", "higher", "neither"] = "neither"
    meaning: str = ""
    heading: str = ""
    compared: Compared | None = None
    brackets: bool = False
    interval_name: str = ""
    places: frozenset[Place] = EVERYWHERE
    frontier: str = ""

    def __post_init__(self) -> None:
        wanted = {OfModel: "model", FromFigures: "model", FromBench: "pair", Against: "pair"}.get(type(self.compute))
        if wanted is not None and wanted != self.of:
            raise ValueError(f"metric {self.name!r}: what {type(self.compute).__name__} computes is of a {wanted}")
        if self.compared is not None and self.of != "model":
            raise ValueError(f"metric {self.name!r}: of a pair already, so there is nothing to compare it with")

    @property
    def comparison(self) -> Metric | None:
        """The row of the comparison with the original, where there is one."""
        if self.compared is None:
            return None
        how = self.compared.how
        return Metric(
            name=self.compared.name or f"{self.name}_{how}",
            label=self.compared.label,
            heading=self.compared.heading,
            compute=Against(self.name, how),
            show=self.compared.show or (signed(self.show) if how == "difference" else times),
            of="pair",
            unit=self.unit if how == "difference" else "",
            better=self.better,
            brackets=how == "difference",
            places=self.compared.places,
            frontier=self.compared.frontier,
        )

    @property
    def column(self) -> str:
        """The heading of a column."""
        return (self.heading or self.label) + (" [95 %]" if self.brackets else "")

    @property
    def hint(self) -> str:
        """Meaning, unit and direction, for who points at a heading."""
        way = "" if self.better == "neither" else f"{self.better} is better"
        unit = "" if self.unit in self.meaning else self.unit
        return "; ".join(part for part in (self.meaning, unit, way) if part)

    @property
    def interval_key(self) -> str:
        """The key of the interval in JSON."""
        return self.interval_name or f"{self.name}_interval"

    def text(self, figure: Figure | None, *, missing: str = "") -> str:
        """A figure in words, with its verdict but without its interval."""
        if figure is None:
            return missing
        return self.show(figure.value) + (f" ({figure.verdict})" if figure.verdict else "")

    def bounds(self, figure: Figure | None) -> str:
        """The interval in brackets where this row shows one."""
        if figure is None or figure.interval is None or not self.brackets:
            return ""
        return f"[{self.show(figure.interval[0])}, {self.show(figure.interval[1])}]"

    def cell(self, figure: Figure | None, *, missing: str = "") -> str:
        """A figure in words with its interval."""
        return f"{self.text(figure, missing=missing)} {self.bounds(figure)}".rstrip()


def fixed(digits: int) -> Callable[[float], str]:
    """Show so many digits behind the point."""
    return lambda value: f"{value:.{digits}f}"


def signed(show: Callable[[float], str]) -> Callable[[float], str]:
    """Show with a sign."""
    return lambda value: ("-" if value < 0 else "+") + show(abs(value))


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{value:.1%}"


def times(value: float) -> str:
    """A ratio."""
    return f"x {value:.3g}"


def in_bytes(value: float) -> str:
    """Bytes with a unit that fits."""
    return size(int(value))


def count(value: float) -> str:
    """A whole number."""
    return f"{int(value):,}"


def perplexity(value: float) -> str:
    """Two digits behind the point, or an exponent where it is astronomical."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"
