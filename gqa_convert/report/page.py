"""The page: one HTML file that needs nothing else. Imports no torch."""

from __future__ import annotations

from html import escape

from gqa_convert.console import size
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.report.collect import Run
from gqa_convert.report.drawings import TITLES
from gqa_convert.report.style import CSS
from gqa_convert.report.tables import bench_table, evaluation_table, measured_on, points_table
from gqa_convert.report.words import verdict

_CAPTIONS = {
    "frontier-cache": "Bars: 95 % intervals. Dashed: points that no other beats.",
    "frontier-time": "Decode time at the largest cache that was timed. Dashed: points that no other beats.",
    "uptraining": "Thin: training loss. With dots: held-out loss.",
    "layers": "One layer converted, all others as in the original.",
    "similarity": "Mean cosine of the weights of heads in a group; aligned: after rotating them onto each other.",
    "cache": "From the measured bytes per token; both axes are logarithmic.",
}


def page(run: Run, plots: dict[str, str]) -> str:
    """Compose the page.

    Args:
        run: what was measured.
        plots: SVG elements by name, see `plots.draw_all`.
    """
    name = run.base.get("base", {}).get("name") or run.folder.resolve().name
    parts = [f"<h1>{escape(str(name))}: what grouped-query attention saves and costs</h1>"]
    parts.append(f'<p class="lead">{escape(verdict(run))}</p>')
    if run.chosen is not None:
        parts.append(_numbers(run, run.chosen))
    if plots:
        figures = "".join(_figure(key, svg) for key, svg in plots.items())
        parts.append(f'<h2>Plots</h2><div class="plots">{figures}</div>')
    if run.points:
        parts += ["<h2>All points</h2>", points_table(run), measured_on(run.base)]
        timed = [(p, run.details[p.name].get("bench")) for p in run.done]
        for point, bench in timed:
            if bench and (run.chosen is None or point.name == run.chosen.name):
                parts += [f"<h2>Decoding, {escape(point.name)}</h2>", bench_table(bench)]
    for evaluation in run.evaluations:
        parts += ["<h2>Quality</h2>", evaluation_table(evaluation)]
    for bench in run.benches:
        parts += ["<h2>Decoding</h2>", bench_table(bench)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(str(name))}: GQA report</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _numbers(run: Run, point: SweepPoint) -> str:
    base = run.base["base"]
    cells = [
        (f"{base['kv_heads']} → {point.groups}", "KV heads"),
        (
            f"{size(base['kv_cache_bytes_per_token'])} → {size(point.cache_bytes_per_token or 0)}",
            f"KV cache per token (x {point.cache_ratio:.3g})",
        ),
        (f"{point.loss_difference:+.4f}", f"loss, nats per token (from {base['loss']:.3f})"),
        (f"{point.top1_agreement:.1%}", "same most likely token"),
        (f"{base['parameters']:,} → {point.parameters:,}", "parameters"),
    ]
    if point.time_ratio is not None:
        cells.insert(2, (f"x {point.time_ratio:.2f}", "decode time"))
    return '<div class="numbers">' + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in cells) + "</div>"


def _figure(name: str, svg: str) -> str:
    return f"<figure><h3>{TITLES[name]}</h3>{svg}<figcaption>{_CAPTIONS[name]}</figcaption></figure>"
