"""Tables of the page, as text: the template makes HTML of it, and escapes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gqa_convert.console import size
from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.deals import conclusions
from gqa_convert.evaluate.decode.results import DecodeResult, lengths
from gqa_convert.evaluate.metric import Against, Apart, Figures, Metric
from gqa_convert.evaluate.results import Comparison, Evaluation, Part, Tasks, part_words, recall_rows
from gqa_convert.evaluate.samples import Sample
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.report.collect import Run, Timed

_BESIDE = 5  # conversions whose samples stand beside the original's


@dataclass(frozen=True)
class Column:
    """A heading, and what it means for who points at it."""

    text: str
    hint: str = ""


@dataclass(frozen=True)
class Row:
    """Cells, of which the first names the row; `tone` colours the last: good, bad, or not."""

    cells: tuple[str, ...]
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; row `best` is marked; `caption` is read aloud, and shown where `caption_shown`."""

    caption: str
    head: tuple[Column, ...]
    rows: tuple[Row, ...]
    best: int | None = None
    caption_shown: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A decode benchmark: its table, what follows from it, and how it was measured."""

    name: str = ""
    table: Table
    conclusions: tuple[str, ...]
    note: str


@dataclass(frozen=True, kw_only=True)
class Quality:
    """An evaluation: its table, how it was measured, what follows, and tasks of lm-eval where they were run."""

    table: Table
    measured_on: str
    conclusions: tuple[str, ...] = ()
    tasks: Table | None = field(default=None)
    recall: Table | None = field(default=None)
    where: tuple[Table, ...] = ()
    asked: Table | None = field(default=None)


def _heads(shown: Sequence[Metric]) -> tuple[Column, ...]:
    return (Column("model"), Column("KV heads"), *(Column(metric.column, metric.hint) for metric in shown))


def _row(name: str, kv_heads: int | str, figures: Figures, shown: Sequence[Metric]) -> Row:
    return Row((name, str(kv_heads), *(metric.cell(figures.get(metric.name)) for metric in shown)))


def points_metrics(run: Run) -> list[Metric]:
    """The columns of the table of points."""
    return metrics.shown("sweep", [point.figures for point in run.points])


def points_table(run: Run) -> Table | None:
    """Every point of a sweep, the original first and the chosen one marked; None without a sweep."""
    if not run.points or run.base is None:
        return None
    shown = points_metrics(run)
    base = run.base.base
    rows = [_row(f"{base.name} (original)", base.heads, base.figures, shown)]
    rows += [_point_row(point, shown) for point in run.points]
    best = run.points.index(run.recommended) + 1 if run.recommended else None
    return Table(caption="All points of the sweep", head=_heads(shown), rows=tuple(rows), best=best)


def _point_row(point: SweepPoint, shown: Sequence[Metric]) -> Row:
    if point.status != "done":
        return Row((point.name, point.heads, *[""] * (len(shown) - 1), "failed"), "bad")
    return _row(point.name, point.heads, point.figures, shown)


def quality(evaluation: Evaluation) -> Quality:
    """One `gqa eval`."""
    base = evaluation.base
    compared = (*evaluation.converted, *evaluation.quantised)
    pairs = [(comparison.model, comparison.model.figures | comparison.figures) for comparison in compared]
    shown = metrics.shown("page", [base.figures, *(figures for _, figures in pairs)])
    scored = [metric for metric in shown if not _is_asked(metric)]
    rows = [_row(f"{base.name} (original)", base.heads, base.figures, scored)]
    rows += [_row(model.name, model.heads, figures, scored) for model, figures in pairs]
    return Quality(
        table=Table(caption="Quality of the conversions", head=_heads(scored), rows=tuple(rows)),
        asked=_asked_table(evaluation, [metric for metric in shown if _is_asked(metric)]),
        measured_on=measured_on(evaluation, shown),
        conclusions=tuple(conclusions(evaluation)),
        tasks=tasks_table(evaluation.tasks),
        recall=recall_table(evaluation),
        where=tuple(where_table(comparison) for comparison in evaluation.converted if comparison.parts),
    )


def _is_asked(metric: Metric) -> bool:
    """Whether it comes from questions (suite, recall), and not from scoring text."""
    own = metrics.row(metric.compute.metric) if isinstance(metric.compute, Against) else metric
    return isinstance(own.compute, Apart)


def _asked_table(evaluation: Evaluation, shown: Sequence[Metric]) -> Table | None:
    """What models answer: a row per kind of question, a column per model; None where nothing was asked."""
    if not shown:
        return None
    base = evaluation.base
    columns = [base.figures, *(each.model.figures | each.figures for each in evaluation.converted)]
    names = [f"{base.name} (original)", *(each.model.name for each in evaluation.converted)]
    rows = tuple(
        Row((metric.column, *(metric.cell(figures.get(metric.name)) for figures in columns))) for metric in shown
    )
    head = (Column("what they answer"), *map(Column, names))
    return Table(caption="What they answer", head=head, rows=rows)


def where_table(comparison: Comparison) -> Table:
    """Where a conversion differs from its original: a row per kind of token, and per stretch of the window."""
    head = (
        Column("tokens of what kind, and where"),
        Column("tokens"),
        Column("original's loss", "nats per token"),
        Column("loss rise [95 %]", "nats per token"),
        Column("KL [95 %]", "KL(original || converted) in nats per token"),
        Column("share of the KL"),
        Column("top-1", "both models rank the same token first; higher is better"),
    )
    rows = tuple(_where_row(part) for part in comparison.parts)
    return Table(caption=f"Where {comparison.model.name} differs", head=head, rows=rows, caption_shown=True)


def _where_row(part: Part) -> Row:
    rise, kl = part.loss_difference, part.kl
    return Row(
        (
            part_words(part),
            f"{part.tokens:,}",
            f"{part.loss:.3f}",
            f"{rise.value:+.3f}" + (f" [{rise.interval[0]:+.3f}, {rise.interval[1]:+.3f}]" if rise.interval else ""),
            f"{kl.value:.3f}" + (f" [{kl.interval[0]:.3f}, {kl.interval[1]:.3f}]" if kl.interval else ""),
            f"{part.kl_share:.1%}",
            f"{part.top1_agreement.value:.1%}",
        )
    )


def measured(run: Run) -> list[Evaluation]:
    """The evaluations that plots of a single model's answers are drawn from: of a sweep that of the chosen point."""
    if not run.points:
        return list(run.evaluations)
    detail = run.details[run.chosen.name] if run.chosen is not None else None
    return [detail.evaluation] if detail is not None and detail.evaluation is not None else []


def with_texts(evaluations: Sequence[Evaluation]) -> list[tuple[str, Evaluation]]:
    """Each with what follows a model's name in a plot of them all: its text, where there are several."""
    several = len({each.data for each in evaluations}) > 1
    return [(f", {each.data}" if several else "", each) for each in evaluations]


def told_apart(run: Run) -> list[tuple[str, Comparison]]:
    """The conversions whose tokens were told apart, each as a plot names it."""
    evaluations = [each for each in measured(run) if any(comparison.parts for comparison in each.converted)]
    return [
        (comparison.model.name + text, comparison)
        for text, each in with_texts(evaluations)
        for comparison in each.converted
        if comparison.parts
    ]


def recall_table(evaluation: Evaluation) -> Table | None:
    """What each model finds again, a row per kind and length of the text; None where it was not measured."""
    names, rows = recall_rows(evaluation)
    head = (Column("recall, tokens"), *(Column(name) for name in names))
    return Table(caption="Recall", head=head, rows=tuple(Row(tuple(row)) for row in rows)) if rows else None


def tasks_table(tasks: Tasks) -> Table | None:
    """Results of lm-eval: a row per task and metric, a column per model; None without any."""
    keys = dict.fromkeys((task, key) for scores in tasks.values() for task, values in scores.items() for key in values)
    rows = tuple(
        Row((f"{task}, {key}", *(_number(scores.get(task, {}).get(key)) for scores in tasks.values())))
        for task, key in keys
    )
    head = (Column("task"), *(Column(name) for name in tasks))
    return Table(caption="lm-eval", head=head, rows=rows, caption_shown=True) if rows else None


def samples(run: Run) -> list[Sample]:
    """What the models of a run write, a sample per beginning: of a sweep the original and its points, best first."""
    if not run.points:
        return [sample for evaluation in run.evaluations for sample in evaluation.samples]
    ranked = sorted(run.done, key=lambda point: (point is not run.recommended, point.loss_difference or 0.0))
    together: dict[str, tuple[tuple[str, str], ...]] = {}
    for point in ranked:
        evaluation = run.details[point.name].evaluation
        for sample in evaluation.samples if evaluation is not None else ():
            present = together.get(sample.prompt)
            together[sample.prompt] = sample.texts if present is None else (*present, *sample.texts[1:])
    return [Sample(prompt=prompt, texts=texts[: 1 + _BESIDE]) for prompt, texts in together.items()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def measured_on(evaluation: Evaluation, shown: Sequence[Metric]) -> str:
    """How an evaluation was measured, and what its figures mean."""
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    when = f" on {evaluation.date}" if evaluation.date else ""
    return (
        f"{evaluation.task} on {evaluation.data}: {evaluation.tokens:,} tokens ({size(evaluation.bytes)} of text) in "
        f"{evaluation.windows:,} windows of {evaluation.context}, one every {evaluation.stride}; measured{when} in "
        f"{evaluation.dtype} on {evaluation.device}; {versions}. {metrics.legend(shown)}."
    )


def decoding(timed: Timed, name: str = "") -> Decoding:
    """One decode benchmark: a row per point and model."""
    bench, rows = timed.bench, []
    for point in bench.points:
        where = f"{point.cache}, batch {point.batch}, {lengths(point.context, point.source_tokens)}"
        if point.skipped:
            rows.append(Row((where, "", f"left out: {point.skipped}", *[""] * 6)))
        rows += [_decode_row(where, model) for model in point.models]
    head = ("cache", "model", "ms/token", "of original", "tokens/s", "cache held", "near floor", "peak", "verdict")
    versions = "".join(f"; {name} {version}" for name, version in bench.versions.items())
    if bench.engine:
        versions = f"; {bench.engine_version}; bytes of the cache {bench.cache_source}"
    note = (
        f"{bench.dtype} on {bench.device}{versions}; medians of {bench.rounds} interleaved rounds of "
        f"{bench.steps} tokens, quartiles in brackets; memory read at {bench.bandwidth / 1e9:.1f} GB/s. "
        "Near floor: time that reading weights and cache alone would take, over the time taken."
    )
    table = Table(caption="Decode time", head=tuple(map(Column, head)), rows=tuple(rows))
    return Decoding(name=name, table=table, conclusions=timed.conclusions, note=note)


def _decode_row(where: str, model: DecodeResult) -> Row:
    ratio = model.time_ratio
    cells = (
        where,
        f"{model.name} ({model.heads})",
        f"{model.seconds.median * 1e3:.3g}",
        "" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        f"{model.tokens_per_second:,.0f}",
        f"{size(model.cache_bytes)} ({model.cache_ratio:.3g})",
        f"{model.floor_share:.0%}",
        "unknown" if model.peak_bytes is None else size(model.peak_bytes),
        model.verdict,
    )
    return Row(cells, {"faster": "good", "slower": "bad"}.get(model.verdict, ""))
