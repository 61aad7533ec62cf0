"""The page: one HTML file that needs nothing else. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.metric import Against, Figure
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.report.collect import Run
from gqa_convert.report.commands import commands
from gqa_convert.report.drawings import CAPTIONS, TITLES
from gqa_convert.report.tables import (
    decoding,
    measured_on,
    points_metrics,
    points_table,
    quality,
    samples,
    told_apart,
    where_table,
)
from gqa_convert.report.words import verdict, written_by

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Tile:
    """A large number, what it is, and what that means."""

    number: str
    label: str
    hint: str = ""


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gqa_convert.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def page(run: Run, plots: dict[str, str]) -> str:
    """Compose the page.

    Args:
        run: what was measured.
        plots: SVG elements by name, see `plots.draw_all`.
    """
    from markupsafe import Markup

    chosen = run.chosen
    timed = run.details[chosen.name].timed if chosen is not None else None
    return _template().render(
        name=run.base.base.name if run.base is not None else run.folder.resolve().name,
        verdict=verdict(run),
        tiles=[] if chosen is None else tiles(run, chosen),
        figures=[{"title": TITLES[name], "caption": CAPTIONS[name], "svg": Markup(svg)} for name, svg in plots.items()],
        points=points_table(run),
        failed=[point for point in run.points if point.status == "failed"],
        deals=[point.deal for point in run.points if point.deal],
        measured_on=measured_on(run.base, points_metrics(run)) if run.base is not None else "",
        chosen_decoding=decoding(timed, chosen.name) if timed is not None and chosen is not None else None,
        chosen_where=[where_table(comparison) for _, comparison in told_apart(run)] if run.points else [],
        evaluations=[quality(evaluation) for evaluation in run.evaluations],
        benches=[decoding(timed) for timed in run.benches],
        samples=samples(run),
        commands=commands(run),
        written_by=written_by(run),
    )


def tiles(run: Run, point: SweepPoint) -> list[Tile]:
    """The large numbers: what a point changes, metric by metric."""
    assert run.base is not None
    base = run.base.base
    numbers = [Tile(f"{base.kv_heads} → {point.heads}", "KV heads")]
    for metric in metrics.shown("tiles", [point.figures]):
        figure = point.figures[metric.name]
        if isinstance(metric.compute, Against):
            own = metrics.row(metric.compute.metric)
            if metric.compute.how == "ratio":
                continue  # said beside the two values it is the ratio of
            before = own.text(base.figures.get(own.name), missing="unknown")
            label = f"{', '.join(part for part in (own.label, own.unit) if part)} (from {before})"
            numbers.append(Tile(metric.text(figure), label, metric.hint))
        elif metric.of == "model":
            ratio = metric.comparison if metric.compared is not None and metric.compared.how == "ratio" else None
            times = ratio.text(point.figures.get(ratio.name)) if ratio is not None else ""
            label = metric.label + (f" ({times})" if times else "")
            before = metric.text(base.figures.get(metric.name), missing="unknown")
            numbers.append(Tile(f"{before} → {metric.text(figure)}", label, metric.hint))
        else:
            numbers.append(Tile(metric.show(figure.value), metric.label + _verdict(figure), metric.hint))
    return numbers


def _verdict(figure: Figure) -> str:
    return f" ({figure.verdict})" if figure.verdict else ""
