"""The metrics: one row each. Imports no torch.

A row says what a figure is called, in what unit, which way is better, how it is computed, shown and compared.
`gqa eval`, `gqa sweep`, their JSON, the frontiers, the report's page and the model cards go over the rows: a new metric
is one more call of `register` below, and nothing else.

Shapes: B examples, T targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gqa_convert.evaluate.metric import (
    EVERYWHERE,
    Apart,
    Compared,
    Figure,
    Figures,
    FromBench,
    FromFigures,
    Metric,
    OfModel,
    PerToken,
    Place,
    TokenScores,
    count,
    fixed,
    in_bytes,
    percent,
    perplexity,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.evaluate.decode.results import Bench
    from gqa_convert.evaluate.models import Subject

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

RECALL = {
    "needle": "one number told in a long text is found again",
    "keys": "the number of one of several keys is found again",
    "variables": "a value handed on from variable to variable is found again",
}
"""Kinds of recall, see `gqa_convert.evaluate.recall`, and what is counted."""

SUITE = {
    "continuations": "the true continuation of a text is the likeliest of four",
    "continuations_by_length": "the same of likelihoods per character (lm-eval's acc_norm)",
    "arithmetic": "sums and differences below 100 are right",
    "copying": "a line is written once more without a fault",
    "json": "JSON with one fault is repaired",
    "code": "functions that a model writes pass their tests",
}
"""Kinds of the suite that are shares of items, see `gqa_convert.evaluate.suite`, and what is counted."""

ANSWERS: dict[str, tuple[str, str, bool]] = {
    "rouge1": ("ROUGE-1", "F1 of the words that an answer and its reference share", True),
    "rouge2": ("ROUGE-2", "the same of pairs of words", True),
    "rougeL": ("ROUGE-L", "the same of their longest common subsequence of words", True),
    "wer": ("word errors", "words changed, left out or put in, of the words that were said", False),
    "cer": ("character errors", "the same of characters", False),
}
"""Kinds of what an encoder-decoder writes against a reference, see `gqa_convert.evaluate.suite.outputs`: what each is
called and is, and whether more of it is better."""

ANSWERS_BESIDE: dict[str, tuple[str, str, bool]] = {
    "rouge_original": ("ROUGE-L, to the original", "ROUGE-L of an answer against the original's", True),
    "same_output": ("same answer", "answers that are the original's, character by character", True),
    "wer_original": ("word errors, to the original", "words that differ, of those that the original writes", False),
}
"""The same of what is set against the original's answer."""


def suite_kind(kind: str) -> str:
    """What `--suite-kinds` calls that which gives a figure of this kind."""
    if kind in ANSWERS or kind in ANSWERS_BESIDE:
        return "wer" if kind in ("wer", "cer", "wer_original") else "rouge"
    return kind.removesuffix("_by_length")


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
        show=perplexity,
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
        show=in_bytes,
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
        show=count,
        places=frozenset(("eval", "tiles", "card")),
    )
)
register(
    Metric(
        name="suite_agreement",
        label="greedy agreement",
        unit="tokens",
        better="higher",
        of="pair",
        compute=Apart("gqa_convert.evaluate.suite.run"),
        show=fixed(1),
        brackets=True,
        meaning="of 64 tokens, those that both models write before they first differ",
        places=frozenset(("eval", "page", "card")),
    )
)
for _kind, (_label, _counted, _more) in (ANSWERS | ANSWERS_BESIDE).items():
    register(
        Metric(
            name=f"suite_{_kind}",
            label=_label,
            better="higher" if _more else "lower",
            of="model" if _kind in ANSWERS else "pair",
            compute=Apart("gqa_convert.evaluate.suite.outputs"),
            show=fixed(3) if "rouge" in _kind else percent,
            meaning=_counted,
            compared=Compared(how="difference", label=f"{_label}, change", places=frozenset(("eval", "page")))
            if _kind in ANSWERS
            else None,
            brackets=_kind in ANSWERS_BESIDE,
            places=frozenset(("eval", "page", "card")),
        )
    )
_APART = [(f"suite_{kind}", kind.replace("_", " "), "suite.run", counted) for kind, counted in SUITE.items()]
_APART += [(f"recall_{kind}", f"recall: {kind}", "recall", counted) for kind, counted in RECALL.items()]
for _name, _label, _module, _counted in _APART:
    register(
        Metric(
            name=_name,
            label=_label,
            better="higher",
            of="model",
            compute=Apart(f"gqa_convert.evaluate.{_module}"),
            show=percent,
            meaning=_counted,
            compared=Compared(how="difference", label=f"{_label}, change", places=frozenset(("eval", "page"))),
            places=frozenset(("eval", "page", "card")),
        )
    )
