"""Compute the figures of models and of pairs, row by row of `metrics`, from what scoring has kept of each window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gqa_convert.evaluate.intervals import mean_per_token
from gqa_convert.evaluate.metric import Against, Figure, Figures, FromFigures, OfModel, PerToken
from gqa_convert.evaluate.metrics import rows
from gqa_convert.evaluate.models import Subject
from gqa_convert.evaluate.results import Evaluation, ModelResult
from gqa_convert.evaluate.scoring import WindowSums


def model_figures(subject: Subject, model: Any, sums: WindowSums, *, block: int) -> Figures:
    """The figures of one model.

    Args:
        subject: the model before it was loaded.
        model: the model.
        sums: of its windows.
        block: neighbouring windows that are resampled together, see `intervals`.
    """
    figures: Figures = {}
    for metric in rows("model"):
        if isinstance(metric.compute, PerToken):
            figures[metric.name] = _mean(sums.sums[metric.name], sums, block)
        elif isinstance(metric.compute, OfModel):
            figures[metric.name] = Figure(metric.compute.value(subject, model))
        elif isinstance(metric.compute, FromFigures):
            value = metric.compute.value(figures, sum(sums.tokens), sum(sums.size))
            if value is not None:
                figures[metric.name] = Figure(value)
    return figures


def pair_figures(
    original: WindowSums,
    converted: WindowSums,
    of_original: Mapping[str, Figure],
    of_converted: Mapping[str, Figure],
    *,
    block: int,
) -> Figures:
    """The figures of a conversion beside its original, except those of the decode benchmark.

    Args:
        original: the original's sums.
        converted: the conversion's sums, over the same windows.
        of_original: the original's own figures.
        of_converted: the conversion's own figures.
        block: neighbouring windows that are resampled together.
    """
    figures: Figures = {}
    for metric in rows("pair"):
        if isinstance(metric.compute, PerToken):
            figures[metric.name] = _mean(converted.sums[metric.name], converted, block)
        elif isinstance(metric.compute, Against):
            name, how = metric.compute.metric, metric.compute.how
            if how == "difference" and name in converted.sums:
                pairs = zip(original.sums[name], converted.sums[name], strict=True)
                figures[metric.name] = _mean([after - before for before, after in pairs], converted, block)
            elif name in of_original and name in of_converted:
                before, after = of_original[name].value, of_converted[name].value
                if how == "difference":
                    figures[metric.name] = Figure(after - before)
                elif before:
                    figures[metric.name] = Figure(after / before)
    return figures


def with_means(
    evaluation: Evaluation,
    own: Mapping[str, Mapping[str, Sequence[float]]],
    of_pair: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    **changes: Any,
) -> Evaluation:
    """Add means over items to an evaluation, with bootstrap intervals; both of a pair are drawn together.

    Args:
        evaluation: of the same models.
        own: by model and metric, a value per item; the items of all models are the same.
        of_pair: the same of metrics of a pair.
        sizes: by metric, what each item's value is out of, where that is not 1.
        changes: to other fields of the evaluation.
    """

    def mean(metric: str, values: Sequence[float]) -> Figure:
        estimate = mean_per_token(values, (sizes or {}).get(metric) or [1] * len(values))
        return Figure(estimate.value, (estimate.low, estimate.high))

    def pair(name: str) -> Figures:
        before = own.get(evaluation.base.name, {})
        differences = {
            f"{metric}_difference": mean(metric, [a - b for a, b in zip(values, before[metric], strict=True)])
            for metric, values in own.get(name, {}).items()
        }
        return differences | {metric: mean(metric, values) for metric, values in (of_pair or {}).get(name, {}).items()}

    def of(model: ModelResult) -> ModelResult:
        means = {metric: mean(metric, values) for metric, values in own.get(model.name, {}).items()}
        return replace(model, figures={**model.figures, **means})

    converted = tuple(
        replace(comparison, model=of(comparison.model), figures=comparison.figures | pair(comparison.model.name))
        for comparison in evaluation.converted
    )
    return replace(evaluation, base=of(evaluation.base), converted=converted, **changes)


def _mean(sums: list[float], windows: WindowSums, block: int) -> Figure:
    estimate = mean_per_token(sums, windows.tokens, block=block)
    return Figure(estimate.value, (estimate.low, estimate.high))
