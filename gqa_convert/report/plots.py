"""The plots of a report, as SVG for the page and as PNG and SVG files. Needs matplotlib (the `report` extra)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.errors import UsageError
from gqa_convert.evaluate.files import write_bytes, write_text
from gqa_convert.report import drawings
from gqa_convert.report.collect import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

INK = "#123456"
"""Stands for the page's own text colour in the SVG; in the PNG it is dark enough to read on white."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.color": "#8a8a8a",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
}


def draw_all(run: Run, folder: Path) -> dict[str, str]:
    """Draw every plot the run has figures for; write PNG and SVG files into `folder`.

    Returns:
        SVG elements for the page, by name, in order.

    Raises:
        UsageError: if matplotlib is not installed.
        OutputError: if the files cannot be written.
    """
    elements = {}
    for name, draw in drawings.DRAWINGS.items():
        svg = _draw(name, draw, run, folder)
        if svg is not None:
            elements[name] = svg
    return elements


def _draw(name: str, draw: Callable[[Any, Run], bool], run: Run, folder: Path) -> str | None:
    with _matplotlib(name) as figure_class:
        figure = figure_class(figsize=(6.4, 3.8))
        axes = figure.add_subplot()
        if not draw(axes, run):
            return None
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=160, transparent=False, facecolor="white", metadata={"Software": None})
    write_text(folder / f"{name}.svg", svg.getvalue())
    write_bytes(folder / f"{name}.png", png.getvalue())
    return inline_svg(svg.getvalue(), name)


@contextmanager
def _matplotlib(name: str) -> Iterator[Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("gqa report draws with matplotlib: pip install 'gqa-convert[report]'.") from error
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        yield Figure


def inline_svg(text: str, name: str) -> str:
    """Make a matplotlib SVG fit a page: no prologue, no fixed size, the page's ink, ids of its own, and a title."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)
    label = f"{drawings.TITLES[name]}. {drawings.CAPTIONS[name]}"
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    return re.sub(r'href="#', f'href="#{name}-', svg)
