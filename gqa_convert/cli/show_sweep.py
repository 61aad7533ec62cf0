"""Tables of a sweep. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gqa_convert.console import wide_console
from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.metrics import QUALITY
from gqa_convert.evaluate.sweep.points import SweepPoint, frontiers

if TYPE_CHECKING:
    from gqa_convert.evaluate.sweep.run import Sweep


def point_line(point: SweepPoint, known: bool) -> str:
    """One line for progress."""
    if point.status == "failed":
        return f"{point.name}: failed, {point.error}"
    rise = metrics.row(QUALITY).text(point.figures.get(QUALITY))
    return f"{point.name}: loss {rise}" + (" (measured before)" if known else "")


def show_sweep(sweep: Sweep) -> None:
    """Print a sweep: every point, the frontier marked, and the recommendation."""
    out = wide_console()
    table = Table(box=None, pad_edge=False)
    shown = metrics.shown("sweep", [point.figures for point in sweep.points])
    for column in ("point", "KV heads", *(metric.column for metric in shown), ""):
        table.add_column(column, justify="left" if column in ("point", "") else "right")
    unbeaten = {name for names in frontiers(sweep.points).values() for name in names}
    for point in sweep.points:
        if point.status == "done":
            cells = [metric.cell(point.figures.get(metric.name), missing="-") for metric in shown]
            cells.append("frontier" if point.name in unbeaten else "")
        else:
            cells = ["failed", *[""] * (len(shown) - 1), point.error]
        table.add_row(Text(point.name), point.heads, *map(Text, cells))
    out.print(table)
    for point in sweep.points:
        if point.groups_per_layer:
            heads = ",".join(map(str, point.groups_per_layer))
            out.print(f"{point.name}: KV heads of layers {heads}", highlight=False, markup=False, soft_wrap=True)
    base = sweep.base["base"]
    figures = metrics.from_json(base, metrics.rows("model"))
    own = ", ".join(
        f"{metric.label} {metric.text(figures[metric.name])}" for metric in metrics.shown("sweep", [figures])
    )
    out.print(
        f"original: {base['name']}, {base['kv_heads']} KV heads, {own}; on {sweep.base['data']} "
        f"({sweep.base['tokens']:,} tokens). {metrics.legend(shown)}.",
        highlight=False,
        markup=False,
        style="dim",
    )
    for point in sweep.points:
        if point.deal:
            out.print(point.deal, highlight=False, markup=False, soft_wrap=True)
    verdict = "Take:" if sweep.recommendation.name else "Nothing to take:"
    out.print(Text.assemble((verdict, "bold"), f" {sweep.recommendation.reason}"))
    out.print(f"Run folder: {sweep.folder} (gqa report {sweep.folder})", highlight=False, markup=False)
