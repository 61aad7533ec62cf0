"""The metrics: one row each. Imports no torch.

A row says what a figure is called, in what unit, which way is better, how it is computed, shown and compared.
`gqa eval`, `gqa sweep`, their JSON, the frontiers, the report's page and the model cards go over the rows: a new metric
is one more call of `register` below, and nothing else.

Shapes: B examples, T targets, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    compute: PerToken | OfModel | FromFigures | FromBench | Against
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
            show=self.compared.show or (signed(self.show) if how == "difference" else _times),
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


_METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Add a row; rows are shown in the order in which they were added.

    Raises:
        ValueError: if the name, or that of its comparison, is taken.
    """
    names = {row.name for row in (metric, metric.comparison) if row is not None}
    taken = names & {row.name for row in rows()}
    if taken:
        raise ValueError(f"metric {sorted(taken)[0]!r} is registered twice")
    _METRICS[metric.name] = metric
    return metric


def rows(of: Literal["model", "pair"] | None = None, place: Place | None = None) -> list[Metric]:
    """All rows, each metric's comparison behind it; those of one kind, or shown in one place."""
    both = [row for metric in _METRICS.values() for row in (metric, metric.comparison) if row is not None]
    return [row for row in both if of in (None, row.of) and (place is None or place in row.places)]


def row(name: str) -> Metric:
    """The row of that name.

    Raises:
        KeyError: if there is none.
    """
    return {metric.name: metric for metric in rows()}[name]


def shown(
    place: Place, tables: Iterable[Mapping[str, Figure]], of: Literal["model", "pair"] | None = None
) -> list[Metric]:
    """The rows of a place that at least one of `tables` has a figure for: no column of a table stays empty."""
    known = {name for figures in tables for name in figures}
    return [metric for metric in rows(of, place) if metric.name in known]


def legend(metrics: Sequence[Metric]) -> str:
    """What the figures of these rows mean, for the small print under a table."""
    parts = [f"{metric.heading or metric.label}: {metric.meaning}" for metric in metrics if metric.meaning]
    if any(metric.brackets for metric in metrics):
        parts.append("[ ]: 95 % bootstrap interval by window, paired")
    return "; ".join(parts)


def to_json(figures: Mapping[str, Figure], metrics: Iterable[Metric]) -> dict[str, Any]:
    """Figures as flat JSON: `name`, its interval and verdict; null for what was not measured."""
    values: dict[str, Any] = {}
    for metric in metrics:
        figure = figures.get(metric.name)
        values[metric.name] = None if figure is None else figure.value
        if figure is not None and figure.interval is not None:
            values[metric.interval_key] = list(figure.interval)
        if figure is not None and figure.verdict:
            values[f"{metric.name}_verdict"] = figure.verdict
    return values


def from_json(values: Mapping[str, Any], metrics: Iterable[Metric]) -> Figures:
    """Undo `to_json`. What is missing (an older file), or no finite number, is left out."""
    figures: Figures = {}
    for metric in metrics:
        value = finite(values.get(metric.name))
        if value is None:
            continue
        bounds = values.get(metric.interval_key)
        low, high = (
            (finite(bound) for bound in bounds)
            if isinstance(bounds, (list, tuple)) and len(bounds) == 2
            else (None, None)
        )
        verdict = values.get(f"{metric.name}_verdict")
        figures[metric.name] = Figure(
            value,
            None if low is None or high is None else (low, high),
            verdict if isinstance(verdict, str) else "",
        )
    return figures


def finite(value: Any) -> float | None:
    """A value of JSON if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def bench_figures(bench: Bench) -> Figures:
    """The figures of a pair that the decode benchmark gives."""
    computed = {row.name: row.compute.figure(bench) for row in rows("pair") if isinstance(row.compute, FromBench)}
    return {name: figure for name, figure in computed.items() if figure is not None}


def fixed(digits: int) -> Callable[[float], str]:
    """Show so many digits behind the point."""
    return lambda value: f"{value:.{digits}f}"


def signed(show: Callable[[float], str]) -> Callable[[float], str]:
    """Show with a sign."""
    return lambda value: ("-" if value < 0 else "+") + show(abs(value))


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{value:.1%}"


def _times(value: float) -> str:
    return f"x {value:.3g}"


def _bytes(value: float) -> str:
    return size(int(value))


def _count(value: float) -> str:
    return f"{int(value):,}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


# ---- What a row computes. Tensors are used by their methods, so that this file needs no torch. ----


def _divergence_BT(scores: TokenScores) -> Tensor:
    """KL(original || model) of each token."""
    assert scores.original_BTV is not None
    terms_BTV = scores.original_BTV.exp() * (scores.original_BTV - scores.logp_BTV)
    # A logit of -inf (a masked token) gives 0 * inf; such tokens add nothing to the divergence.
    divergence_BT: Tensor = terms_BTV.nan_to_num(nan=0.0).sum(-1)
    return divergence_BT


def _agreement_BT(scores: TokenScores) -> Tensor:
    assert scores.original_BTV is not None
    return scores.original_BTV.argmax(-1) == scores.logp_BTV.argmax(-1)


def _bits_per_byte(figures: Mapping[str, Figure], tokens: int, text_bytes: int) -> float | None:
    return figures["loss"].value * tokens / math.log(2) / text_bytes if text_bytes else None


def _parameters(subject: Subject, model: Any) -> int:
    from gqa_convert.evaluate.models import parameters

    return parameters(model)


def _cache(subject: Subject, model: Any) -> int:
    from gqa_convert.evaluate.models import cache_bytes_per_token

    return cache_bytes_per_token(model)


def _decode_time(bench: Bench) -> Figure | None:
    """The ratio of decode times at the largest cache that was run, and whether it is a difference at all."""
    run = [point for point in bench.points if len(point.models) > 1]
    if not run:
        return None
    converted = max(run, key=lambda point: point.batch * point.context).models[1]
    ratio = converted.time_ratio
    # Not as the interval: a spread of rounds is in quartiles.
    return None if ratio is None else Figure(ratio.median, verdict=converted.verdict)


# ---- The rows. ----

QUALITY = "loss_difference"
"""The figure that a sweep's tolerance, frontiers and recommendation go by."""

register(
    Metric(
        name="loss",
        label="loss",
        unit="nats per token",
        better="lower",
        of="model",
        compute=PerToken(lambda scores: -scores.target_logp_BT),
        show=fixed(4),
        meaning="cross-entropy in nats per token",
        compared=Compared(how="difference", label="loss rise"),
        places=EVERYWHERE - {"tiles"},
    )
)
register(
    Metric(
        name="perplexity",
        label="perplexity",
        better="lower",
        of="model",
        compute=FromFigures(lambda figures, tokens, text_bytes: math.exp(min(figures["loss"].value, 700.0))),
        show=_perplexity,
        places=frozenset(("eval", "page", "card")),
    )
)
register(
    Metric(
        name="bits_per_byte",
        label="bits per byte",
        better="lower",
        of="model",
        compute=FromFigures(_bits_per_byte),
        show=fixed(4),
        places=frozenset(("eval", "card")),
    )
)
register(
    Metric(
        name="kl",
        label="KL",
        unit="nats per token",
        better="lower",
        of="pair",
        compute=PerToken(_divergence_BT),
        show=fixed(4),
        meaning="KL(original || converted) in nats per token",
        places=EVERYWHERE - {"tiles"},
    )
)
register(
    Metric(
        name="top1_agreement",
        label="top-1 agreement",
        heading="top-1",
        better="higher",
        of="pair",
        compute=PerToken(_agreement_BT),
        show=percent,
        meaning="both models rank the same token first",
        interval_name="top1_interval",
    )
)
register(
    Metric(
        name="kv_cache_bytes_per_token",
        label="KV cache per token",
        heading="cache/token",
        better="lower",
        of="model",
        compute=OfModel(_cache),
        show=_bytes,
        compared=Compared(
            how="ratio",
            name="cache_ratio",
            label="KV cache, of the original's",
            heading="of original",
            frontier="cache",
        ),
    )
)
register(
    Metric(
        name="time_ratio",
        label="decode time, of the original's",
        heading="decode time",
        better="lower",
        of="pair",
        compute=FromBench(_decode_time),
        show=lambda value: f"x {value:.2f}",
        frontier="time",
    )
)
register(
    Metric(
        name="parameters",
        label="parameters",
        better="neither",
        of="model",
        compute=OfModel(_parameters),
        show=_count,
        places=frozenset(("eval", "tiles", "card")),
    )
)
