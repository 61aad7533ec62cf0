"""Tables of a sweep. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from gqa_convert.console import size, wide_console
from gqa_convert.evaluate.sweep.points import SweepPoint, frontier

if TYPE_CHECKING:
    from gqa_convert.evaluate.sweep.run import Sweep


def point_line(point: SweepPoint, known: bool) -> str:
    """One line for progress."""
    if point.status == "failed":
        return f"{point.name}: failed, {point.error}"
    return f"{point.name}: loss {point.loss_difference:+.4f}" + (" (measured before)" if known else "")


def show_sweep(found: Sweep) -> None:
    """Print a sweep: every point, the frontier marked, and the recommendation."""
    out = wide_console()
    table = Table(box=None, pad_edge=False)
    for column in ("point", "KV heads", "loss rise [95 %]", "KL", "top-1", "cache/token", "of base", "decode time", ""):
        table.add_column(column, justify="left" if column in ("point", "") else "right")
    best = set(frontier(found.points, lambda p: p.cache_bytes_per_token))
    for point in found.points:
        table.add_row(*_cells(point, point.name in best))
    out.print(table)
    base = found.base["base"]
    out.print(
        f"original: {base['name']}, {base['kv_heads']} KV heads, loss {base['loss']:.4f} on {found.base['data']} "
        f"({found.base['tokens']:,} tokens), cache {size(base['kv_cache_bytes_per_token'])} per token",
        highlight=False,
        style="dim",
    )
    out.print(f"[bold]{'Take' if found.recommendation.name else 'Nothing to take'}:[/] {found.recommendation.reason}")
    out.print(f"Run folder: {found.folder} (gqa report {found.folder})", highlight=False)


def _cells(point: SweepPoint, on_frontier: bool) -> list[str]:
    if point.status != "done" or point.interval is None or point.cache_bytes_per_token is None:
        return [point.name, str(point.groups), "failed", "", "", "", "", "", point.error]
    return [
        point.name,
        str(point.groups),
        f"{point.loss_difference:+.4f} [{point.interval[0]:+.4f}, {point.interval[1]:+.4f}]",
        f"{point.kl:.4f}",
        f"{point.top1_agreement:.1%}",
        size(point.cache_bytes_per_token),
        f"x {point.cache_ratio:.3g}",
        "-" if point.time_ratio is None else f"x {point.time_ratio:.2f}",
        "frontier" if on_frontier else "",
    ]
