"""The table of an evaluation. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from gqa_convert.console import console, size
from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.deals import conclusions
from gqa_convert.evaluate.metric import Figures, Metric
from gqa_convert.evaluate.results import Comparison, Evaluation, recall_rows, where_words

_MODELS_PER_TABLE = 4


def show_evaluation(evaluation: Evaluation) -> None:
    """Print an evaluation: a row per metric, a column per model, so that it fits a narrow terminal."""
    out = console()
    converted = (*evaluation.converted, *evaluation.quantised)
    for start in range(0, max(len(converted), 1), _MODELS_PER_TABLE):
        out.print(_table(evaluation, converted[start : start + _MODELS_PER_TABLE]))
    out.print(
        f"{evaluation.task} on {evaluation.data}: {evaluation.tokens:,} tokens ({size(evaluation.bytes)} of text) in "
        f"{evaluation.windows:,} windows of {evaluation.context}, one every {evaluation.stride}; {evaluation.dtype} on "
        f"{evaluation.device}. {metrics.legend(_shown(evaluation))}.",
        highlight=False,
        markup=False,
        style="dim",
    )
    for line in filter(None, map(where_words, evaluation.converted)):
        out.print(line, highlight=False, markup=False)
    if evaluation.recall:
        out.print(_recall(evaluation))
    for sample in evaluation.samples:
        out.print(f"... {' '.join(sample.prompt.split())}", style="dim", highlight=False, markup=False)
        for name, text in sample.texts:
            out.print(f"{name}: {' '.join(text.split())}", highlight=False, markup=False)
    for line in conclusions(evaluation):
        out.print(line, highlight=False, markup=False)
    for name, scores in evaluation.tasks.items():
        for task, values in scores.items():
            line = f"{name}  {task}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            out.print(line, markup=False)


def _recall(evaluation: Evaluation) -> Table:
    names, rows = recall_rows(evaluation)
    table = Table("recall, tokens", box=None, pad_edge=False)
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _shown(evaluation: Evaluation) -> list[Metric]:
    """A model's own figures first, then those of a pair."""
    pairs = (*evaluation.converted, *evaluation.quantised)
    own = metrics.shown("eval", [evaluation.base.figures, *(c.model.figures for c in pairs)], "model")
    return own + metrics.shown("eval", [comparison.figures for comparison in pairs], "pair")


def _table(evaluation: Evaluation, converted: Sequence[Comparison]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    models = (evaluation.base, *(comparison.model for comparison in converted))
    for model in models:
        table.add_column(Text(model.name), justify="right", overflow="fold")
    table.add_row("KV heads", *(f"{model.heads} of {model.query_heads}" for model in models))
    pairs: list[Figures] = [{}, *(comparison.figures for comparison in converted)]
    for metric in _shown(evaluation):
        figures = [model.figures for model in models] if metric.of == "model" else pairs
        cells = [by_name.get(metric.name) for by_name in figures]
        table.add_row(metric.label, *(metric.text(cell) for cell in cells))
        if metric.brackets:
            table.add_row("", *(metric.bounds(cell) for cell in cells))
    return table
