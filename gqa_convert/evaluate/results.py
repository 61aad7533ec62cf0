"""The results of an evaluation: plain values that turn into JSON and back. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from gqa_convert.evaluate.deals import conclusions
from gqa_convert.evaluate.metric import Figure, Figures, FromBench, Metric
from gqa_convert.evaluate.metrics import from_json, rows, to_json
from gqa_convert.evaluate.samples import Sample
from gqa_convert.heads import kv_heads_words
from gqa_convert.outcome import Outcome

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Tasks = dict[str, dict[str, dict[str, float]]]
"""Values of lm-eval by model, task and metric."""


KINDS = ("word", "word piece", "number", "punctuation", "white space", "special")
"""Kinds of token that a comparison is told apart by, see `gqa_convert.evaluate.places`."""


def pair_rows() -> list[Metric]:
    """The rows of a pair that an evaluation measures."""
    return [row for row in rows("pair") if not isinstance(row.compute, FromBench)]


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One model's own figures.

    Attributes:
        name: folder name.
        query_heads: of the decoder.
        kv_heads: of the decoder; where layers differ, of the one that has most.
        kv_heads_per_layer: where layers differ; else empty.
        figures: by metric, see `metrics`.
        cache: format of its cache, of `gqa_convert.evaluate.decode.settings.QUANTISED`; empty for the model's dtype.
    """

    name: str
    query_heads: int
    kv_heads: int
    kv_heads_per_layer: tuple[int, ...] = ()
    figures: Figures
    cache: str = ""

    @property
    def heads(self) -> str:
        """The KV heads in words."""
        return kv_heads_words(self.kv_heads, self.kv_heads_per_layer)

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return self.figures["loss"].value

    @property
    def loss_interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of `loss`."""
        return _interval(self.figures, "loss")

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return self.figures["perplexity"].value

    @property
    def bits_per_byte(self) -> float | None:
        """Loss over the UTF-8 bytes of the scored text; None where that is unknown."""
        figure = self.figures.get("bits_per_byte")
        return None if figure is None else figure.value

    @property
    def parameters(self) -> int:
        """Tied ones counted once."""
        return int(self.figures["parameters"].value)

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Measured, in the dtype the model ran in."""
        return int(self.figures["kv_cache_bytes_per_token"].value)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values, each by its metric's name."""
        heads: dict[str, Any] = {"name": self.name, "query_heads": self.query_heads, "kv_heads": self.kv_heads}
        if self.cache:
            heads["cache"] = self.cache
        if self.kv_heads_per_layer:
            heads["kv_heads_per_layer"] = list(self.kv_heads_per_layer)
        return heads | to_json(self.figures, rows("model"))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a conversion costs in some of the tokens, see `gqa_convert.evaluate.places`.

    Attributes:
        by: `kind` of token, or `position` in the window.
        name: of `KINDS`; or from how many to how many tokens stand before.
        tokens: scored ones.
        loss: the original's, in nats per token.
        loss_difference: the conversion's less the original's.
        kl: KL(original || converted) in nats per token.
        top1_agreement: share of tokens at which both models rank the same token first.
        kl_share: of the KL of all tokens.
    """

    by: str
    name: str
    tokens: int
    loss: float
    loss_difference: Figure
    kl: Figure
    top1_agreement: Figure
    kl_share: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A converted model against its original; intervals are 95 % bootstrap intervals, paired by window.

    Attributes:
        model: the converted model's own figures.
        figures: those of the pair, by metric.
        seconds: time to score both models.
        parts: the same by kind of token and by position; empty in files written before they were told apart.
    """

    model: ModelResult
    figures: Figures
    seconds: float
    parts: tuple[Part, ...] = ()

    @property
    def loss_difference(self) -> float:
        """Nats per token more than the original."""
        return self.figures["loss_difference"].value

    @property
    def loss_difference_interval(self) -> tuple[float, float]:
        """The interval of `loss_difference`."""
        return _interval(self.figures, "loss_difference")

    @property
    def kl(self) -> float:
        """KL(original || converted), nats per token."""
        return self.figures["kl"].value

    @property
    def kl_interval(self) -> tuple[float, float]:
        """The interval of `kl`."""
        return _interval(self.figures, "kl")

    @property
    def top1_agreement(self) -> float:
        """Share of tokens at which both models rank the same token first."""
        return self.figures["top1_agreement"].value

    @property
    def top1_interval(self) -> tuple[float, float]:
        """The interval of `top1_agreement`."""
        return _interval(self.figures, "top1_agreement")

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values, each by its metric's name, those of the model under `model`."""
        values = {"model": self.model.to_json(), "seconds": self.seconds} | to_json(self.figures, pair_rows())
        return values | {"parts": [_part_to_json(part) for part in self.parts]}


def _interval(figures: Figures, name: str) -> tuple[float, float]:
    """The interval of a mean over tokens; the value itself where a file names none."""
    return figures[name].interval or (figures[name].value, figures[name].value)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Loss rise, in nats per token, of converting this layer alone, with its 95 % bootstrap interval."""

    layer: str
    loss_difference: float
    interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """The cost as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LayerSimilarity:
    """Mean cosine between the weights of heads that share a group, over all pairs of a layer."""

    layer: str
    keys_before: float
    keys_after: float
    values_before: float
    values_after: float

    def to_json(self) -> dict[str, Any]:
        """The similarity as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What one model found again in texts of one length; see `gqa_convert.evaluate.recall`.

    Attributes:
        model: its name.
        kind: of `metrics.RECALL`.
        context: tokens of each text.
        right: of each item, in order of depth; the items of all models are the same.
    """

    model: str
    kind: str
    context: int
    right: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What one model scored in one kind of task; see `gqa_convert.evaluate.suite`.

    Attributes:
        model: its name.
        kind: of `metrics.SUITE` or `metrics.ANSWERS`, or `agreement`.
        scores: of each item, 1 where it is right, of `agreement` the tokens; the items of all models are the same.
        written: the beginning of each answer, where it was generated.
        sizes: of each item, what its score is out of (of word errors the words); empty: 1 each.
    """

    model: str
    kind: str
    scores: tuple[float, ...]
    written: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation(Outcome):
    """An original, its conversions, and how they were measured.

    Attributes:
        task: `next token`, `span corruption`, `pairs` or `transcripts`.
        data: name of the data (no path).
        context: tokens per window.
        stride: tokens from one window to the next.
        windows: windows scored.
        tokens: tokens scored.
        bytes: UTF-8 bytes of text behind them.
        dtype: what the models ran in.
        device: what they ran on.
        settings: everything else a repetition needs.
        versions: of the libraries.
        base: the original's figures.
        converted: one entry per conversion.
        tasks: results of lm-eval by model name, where asked for.
        quantised: original and conversions with caches in fewer bits, each beside the original with its whole cache.
        recall: by model, kind and context, where asked for.
        suite: by model and kind, where asked for.
        samples: what the models write after the same beginnings, where asked for.
        date: the day it was measured on (UTC), as 2026-01-31; empty in files written before it was recorded.
    """

    task: str
    data: str
    context: int
    stride: int
    windows: int
    tokens: int
    bytes: int
    dtype: str
    device: str
    settings: dict[str, Any]
    versions: dict[str, str]
    base: ModelResult
    converted: tuple[Comparison, ...]
    tasks: Tasks = field(default_factory=dict)
    date: str = ""
    quantised: tuple[Comparison, ...] = ()
    recall: tuple[Recall, ...] = ()
    suite: tuple[SuiteResult, ...] = ()
    samples: tuple[Sample, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        values: dict[str, Any] = {"format": 1, "kind": "evaluation"} | asdict(self)
        values["base"] = self.base.to_json()
        for name in ("converted", "quantised"):
            values[name] = [comparison.to_json() for comparison in getattr(self, name)]
        return values | {"conclusions": conclusions(self)}

    def table_rows(self) -> list[dict[str, Any]]:
        """A row per model, the original first; what was measured of a pair stands with the converted one."""
        rows = [self.base.to_json()]
        for comparison in self.converted:
            pair = comparison.to_json()
            rows.append(pair.pop("model") | pair)
        return rows

    @classmethod
    def from_json(cls, values: Any) -> Evaluation:
        """Undo `to_json`; also reads files from before a metric was there, which then lack its figures.

        Raises:
            ValueError: if it is no evaluation; says which value is at fault.
        """
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        pairs = {name: _pairs(values.get(name)) for name in ("converted", "quantised")}
        return _adapter().validate_python(values | {"base": _with_figures(values.get("base"))} | pairs)


def part_words(part: Part) -> str:
    """What tokens a part holds."""
    return part.name if part.by == "kind" else f"behind {part.name.replace('-', ' to ')} tokens"


def where_words(comparison: Comparison) -> str:
    """Where a conversion differs most from its original, in a line; empty where that was not told apart."""
    kinds = sorted((p for p in comparison.parts if p.by == "kind"), key=lambda part: -part.kl_share)
    if not kinds:
        return ""
    shares = ", ".join(f"{p.name} {p.kl_share:.0%} ({p.kl.value:.3f} per token)" for p in kinds[:3])
    line = f"{comparison.model.name}: of its KL, {shares}"
    places = [part for part in comparison.parts if part.by == "position"]
    if len(places) > 1:
        first, last = places[0], places[-1]
        line += (
            f"; top-1 agreement {first.top1_agreement.value:.1%} {part_words(first)}, "
            f"{last.top1_agreement.value:.1%} {part_words(last)}"
        )
    return f"{line}."


def recall_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """The models, and for each kind and context a row: its name, and what each model has right of how many."""
    names = list(dict.fromkeys(result.model for result in evaluation.recall))
    seen = {(r.kind, r.context, r.model): f"{sum(r.right)} of {len(r.right)}" for r in evaluation.recall}
    keys = dict.fromkeys((r.kind, r.context) for r in evaluation.recall)
    return names, [
        [f"{kind}, {context:,}", *(seen.get((kind, context, n), "") for n in names)] for kind, context in keys
    ]


@cache
def _adapter() -> TypeAdapter[Evaluation]:
    from pydantic import TypeAdapter

    return TypeAdapter(Evaluation)


def _pairs(values: Any) -> list[dict[str, Any]]:
    return [
        _with_figures(entry, pair_rows())
        | {"model": _with_figures(entry["model"]), "parts": _parts(entry.get("parts"))}
        for entry in (values if isinstance(values, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("model"), dict)
    ]


_PART_FIGURES = ("loss_difference", "kl", "top1_agreement")


def _part_to_json(part: Part) -> dict[str, Any]:
    """A part with its figures flat, as those of a pair are."""
    values = asdict(part)
    for name in _PART_FIGURES:
        figure: Figure = getattr(part, name)
        values[name] = figure.value
        values[f"{name}_interval"] = figure.interval and list(figure.interval)
    return values


def _parts(values: Any) -> list[Any]:
    """Undo `_part_to_json` as far as the shape goes; whether the values fit is checked with all others."""
    if not isinstance(values, list):
        return []
    found = []
    for value in values:
        figures = (
            {name: {"value": value.get(name), "interval": value.get(f"{name}_interval")} for name in _PART_FIGURES}
            if isinstance(value, dict)
            else {}
        )
        found.append(value | figures if figures else value)
    return found


def _with_figures(values: Any, metrics: list[Metric] | None = None) -> dict[str, Any]:
    """JSON of a model or a pair with its figures gathered under `figures`."""
    if not isinstance(values, dict):
        return {}
    return values | {"figures": from_json(values, rows("model") if metrics is None else metrics)}
