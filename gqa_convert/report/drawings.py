"""What each plot shows. A drawing fills the axes and says whether there was anything to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gqa_convert.evaluate.metric import Metric
from gqa_convert.evaluate.metrics import QUALITY, row, rows
from gqa_convert.evaluate.results import Part
from gqa_convert.evaluate.sweep.points import SweepPoint, frontiers
from gqa_convert.report.collect import Run
from gqa_convert.report.labels import place_labels
from gqa_convert.report.tables import measured, told_apart, with_texts

COLORS = ("#2f7ed8", "#e0762f", "#3a9d5d", "#b455c8", "#c8a415", "#17a2b8", "#d14a61")
"""Each readable on white and on near black."""

_LOG_FROM = 8
"""Loss rises are drawn on a logarithmic axis where the largest is this many times the middle one."""

_CONTEXTS = tuple(1 << n for n in range(9, 18))


def _by_variant(run: Run) -> dict[str, list[SweepPoint]]:
    variants: dict[str, list[SweepPoint]] = {}
    for point in sorted(run.done, key=lambda p: p.mean_groups):
        variants.setdefault(point.variant, []).append(point)
    return variants


def _frontier(axes: Any, run: Run, *, cost: Metric) -> bool:
    """Loss rise against a cost, a colour per variant; labels: KV heads."""
    quality = row(QUALITY)
    labels = []
    for color, (variant, points) in zip(COLORS * 9, _by_variant(run).items(), strict=False):
        known = [p for p in points if p.value(cost.name) is not None]
        if not known:
            continue
        xs, ys = [p.value(cost.name) or 0.0 for p in known], [p.loss_difference or 0.0 for p in known]
        bars = _bars([(p.loss_difference or 0.0, p.interval) for p in known])
        axes.errorbar(xs, ys, yerr=bars, fmt="o", color=color, capsize=3, label=variant, markersize=6)
        labels += [(x, y, p.heads) for x, y, p in zip(xs, ys, known, strict=True)]
    if not labels:
        return False
    order = frontiers(run.points)[cost.frontier]
    line = sorted((p for p in run.done if p.name in order), key=lambda p: order.index(p.name))
    axes.plot([p.value(cost.name) for p in line], [p.loss_difference for p in line], "--", color="#8a8a8a", zorder=0)
    _dwarfed(axes, [y for _, y, _ in labels])
    if run.recommendation is not None:
        tolerance = run.recommendation.tolerance
        axes.axhline(tolerance, color="#d14a61", linewidth=1, linestyle=":", label=f"tolerance {tolerance:g}")
    axes.set_xlabel(f"{cost.label} (labels: KV heads)")
    axes.set_ylabel(f"{quality.label}, {quality.unit}")
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    axes.legend(fontsize=9)
    place_labels(axes, labels)
    return True


def _dwarfed(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where one value would leave no room for the others; linear near 0 if some are below."""
    rises = sorted(values)
    middle = rises[len(rises) // 2]
    if rises[-1] <= _LOG_FROM * max(middle, 0.0) or rises[-1] <= 0:
        return
    if rises[0] > 0:
        axes.set_yscale("log")
    else:
        least = min((abs(value) for value in rises if value), default=1.0)
        axes.set_yscale("symlog", linthresh=max(least, rises[-1] / 1000))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _bars(values: Sequence[tuple[float, tuple[float, float] | None]]) -> list[list[float]]:
    """Lengths of error bars down and up; none where there is no interval."""
    bounds = [(value, interval or (value, value)) for value, interval in values]
    return [
        [max(0.0, value - low) for value, (low, _) in bounds],
        [max(0.0, high - value) for value, (_, high) in bounds],
    ]


def uptraining(axes: Any, run: Run) -> bool:
    """Training and held-out loss of uptraining runs."""
    for color, curve in zip(COLORS * 9, run.curves, strict=False):
        if curve.train:
            axes.plot(*zip(*curve.train, strict=True), color=color, alpha=0.45, linewidth=1)
        if curve.held_out:
            axes.plot(
                *zip(*curve.held_out, strict=True), "o-", color=color, markersize=4, label=f"{curve.name}, held out"
            )
    if not run.curves:
        return False
    reference = next((curve.reference for curve in run.curves if curve.reference is not None), None)
    if reference is not None:
        axes.axhline(reference, color="#8a8a8a", linewidth=1, linestyle=":", label="the original, held out")
    axes.set_xlabel(run.curves[0].unit)
    axes.set_ylabel("loss, nats per token")
    if reference is not None or any(curve.held_out for curve in run.curves):
        axes.legend(fontsize=9)
    return True


def layers(axes: Any, run: Run) -> bool:
    """Loss rise of converting one layer alone."""
    if run.layers is None or not run.layers.layers:
        return False
    costs = run.layers.layers
    values = [cost.loss_difference for cost in costs]
    bars = _bars([(cost.loss_difference, cost.interval) for cost in costs])
    axes.bar(range(len(values)), values, color=COLORS[0], yerr=bars, error_kw={"ecolor": "#8a8a8a", "capsize": 2})
    axes.set_xlabel(f"layer (converted alone, as in {run.layers.point})")
    axes.set_ylabel("loss rise, nats per token")
    axes.set_xticks(_ticks(len(values)))
    return True


def similarity(axes: Any, run: Run) -> bool:
    """Cosine between the heads of a group, before and after alignment."""
    if run.similarity is None or not run.similarity.layers:
        return False
    compared = run.similarity.layers
    for color, part in zip(COLORS, ("keys", "values"), strict=False):
        for when, style in (("before", "o--"), ("after", "o-")):
            values = [getattr(layer, f"{part}_{when}") for layer in compared]
            label = f"{part}, {'as they stand' if when == 'before' else 'aligned'}"
            axes.plot(range(len(values)), values, style, color=color, markersize=4, label=label)
    axes.set_xlabel(f"layer (groups of adjacent heads, {run.similarity.groups} KV heads)")
    axes.set_ylabel("cosine of heads in a group")
    axes.set_xticks(_ticks(len(compared)))
    axes.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return True


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 12)))


def heads(axes: Any, run: Run) -> bool:
    """KV heads of every layer, of the points whose layers differ."""
    differing = [p for p in run.done if p.groups_per_layer]
    for number, (color, point) in enumerate(zip(COLORS * 9, differing, strict=False)):
        counts = point.groups_per_layer
        width = 0.8 / len(differing)
        places = [layer + (number - (len(differing) - 1) / 2) * width for layer in range(len(counts))]
        axes.bar(places, counts, width, color=color, label=f"{point.variant}, {point.name.rpartition('-kv')[2]}")
    if not differing:
        return False
    axes.set_xlabel("layer")
    axes.set_ylabel("KV heads")
    axes.set_xticks(_ticks(max(len(p.groups_per_layer) for p in differing)))
    axes.legend(fontsize=9)
    return True


def cache(axes: Any, run: Run) -> bool:
    """Cache of one sequence against context, for every number of KV heads."""
    even = [p for p in run.done if not p.groups_per_layer]
    sizes = {p.groups: p.cache_bytes_per_token for p in even if p.cache_bytes_per_token}
    models = [run.base.base] if run.base is not None else []
    models += [comparison.model for evaluation in run.evaluations for comparison in evaluation.converted]
    measured = ((model.kv_heads, model.figures.get("kv_cache_bytes_per_token")) for model in models)
    sizes |= {heads: figure.value for heads, figure in measured if figure is not None and figure.value > 0}
    if len(sizes) < 2:
        return False
    for color, (groups, size) in zip(COLORS * 9, sorted(sizes.items(), reverse=True), strict=False):
        axes.plot(_CONTEXTS, [size * n / 2**20 for n in _CONTEXTS], "-", color=color, label=f"{groups} KV heads")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(_CONTEXTS[::2], [f"{n // 1024}k" if n >= 1024 else str(n) for n in _CONTEXTS[::2]])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("KV cache of one sequence, MiB")
    axes.legend(fontsize=9)
    return True


def kinds(axes: Any, run: Run) -> bool:
    """KL per token by kind of token, a bar per conversion."""
    compared = told_apart(run)
    names = list(dict.fromkeys(part.name for _, each in compared for part in each.parts if part.by == "kind"))
    if not names:
        return False
    width = 0.8 / len(compared)
    for number, (color, (label, each)) in enumerate(zip(COLORS * 9, compared, strict=False)):
        shown = [part for part in each.parts if part.by == "kind"]
        places = [names.index(part.name) + (number - (len(compared) - 1) / 2) * width for part in shown]
        bars = _bars([(part.kl.value, part.kl.interval) for part in shown])
        axes.bar(
            places, [part.kl.value for part in shown], width, color=color, label=label,
            yerr=bars, error_kw={"ecolor": "#8a8a8a", "capsize": 2},
        )  # fmt: skip
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.set_ylabel("KL, nats per token")
    axes.legend(fontsize=9)
    return True


def positions(axes: Any, run: Run) -> bool:
    """Top-1 agreement against the tokens before, a line per conversion; a dot in the middle of each stretch."""
    edges: set[int] = set()
    for color, (label, each) in zip(COLORS * 9, told_apart(run), strict=False):
        shown = [(part.top1_agreement, ends) for part in each.parts if (ends := _stretch(part))]
        if len(shown) < 2:
            continue
        values = [(figure.value, figure.interval) for figure, _ in shown]
        middles = [math.sqrt(low * high) for _, (low, high) in shown]
        heights = [value for value, _ in values]
        axes.errorbar(middles, heights, yerr=_bars(values), fmt="o-", color=color, capsize=2, markersize=4, label=label)
        edges |= {end for _, (low, high) in shown for end in (low, high + 1)}
    if not edges:
        return False
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(edges), [str(edge) for edge in sorted(edges)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("tokens before")
    axes.set_ylabel("top-1 agreement")
    axes.legend(fontsize=9)
    return True


def recall(axes: Any, run: Run) -> bool:
    """The share of questions answered right against the length of the text, a line per model, all kinds together."""
    right: dict[str, dict[int, list[bool]]] = {}
    for text, evaluation in with_texts([each for each in measured(run) if each.recall]):
        for result in filter(lambda result: result.right, evaluation.recall):
            right.setdefault(result.model + text, {}).setdefault(result.context, []).extend(result.right)
    contexts = sorted({context for answers in right.values() for context in answers})
    if len(contexts) < 2:
        return False
    for color, (name, answers) in zip(COLORS * 9, right.items(), strict=False):
        lengths = sorted(answers)
        shares = [sum(answers[length]) / len(answers[length]) for length in lengths]
        axes.plot(lengths, shares, "o-", color=color, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("tokens of text")
    axes.set_ylabel("answered right")
    axes.legend(fontsize=9)
    return True


def _stretch(part: Part) -> tuple[int, int] | None:
    """From how many to how many tokens stand before; None for another kind of part, or a name that is no such pair."""
    ends = [int(end) for end in part.name.split("-") if end.isascii() and end.isdecimal() and len(end) < 10]
    return (ends[0], ends[1]) if part.by == "position" and len(ends) == 2 and 0 < ends[0] <= ends[1] else None


_COSTS = {f"frontier-{metric.frontier}": metric for metric in rows() if metric.frontier}

DRAWINGS: dict[str, Callable[[Any, Run], bool]] = {
    **{name: partial(_frontier, cost=metric) for name, metric in _COSTS.items()},
    "uptraining": uptraining,
    "layers": layers,
    "heads": heads,
    "similarity": similarity,
    "cache": cache,
    "kinds": kinds,
    "positions": positions,
    "recall": recall,
}

TITLES = {
    **{name: f"Quality against {metric.label.partition(',')[0]}" for name, metric in _COSTS.items()},
    "uptraining": "Uptraining",
    "layers": "What each layer costs by itself",
    "heads": "KV heads of each layer",
    "similarity": "How alike the heads of a group are",
    "cache": "Cache against context",
    "kinds": "Which tokens differ",
    "positions": "Agreement within the window",
    "recall": "Recall against the length of the text",
}

CAPTIONS = {
    **dict.fromkeys(_COSTS, "Bars: 95 % intervals. Dashed: points that no other beats."),
    "uptraining": "Thin: training loss. With dots: held-out loss.",
    "layers": "One layer converted, all others as in the original.",
    "heads": "Chosen by what each layer costs alone; more where it costs more.",
    "similarity": "Mean cosine of the weights of heads in a group; aligned: after rotating them onto each other.",
    "kinds": "KL(original || converted) by kind of token. Bars: 95 % intervals.",
    "positions": "Both models rank the same token first, by how many tokens stand before. Bars: 95 % intervals.",
    "recall": "Numbers told somewhere in a text, asked for at its end; all kinds together, each alone in the table.",
    "cache": "From the measured bytes per token; both axes are logarithmic.",
}
