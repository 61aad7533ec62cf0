"""What each plot shows. A drawing fills the axes and says whether there was anything to draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gqa_convert.evaluate.sweep.points import SweepPoint, frontier
from gqa_convert.report.collect import Run

COLORS = ("#2f7ed8", "#e0762f", "#3a9d5d", "#b455c8", "#c8a415", "#17a2b8", "#d14a61")
"""Each readable on white and on near black."""

_CONTEXTS = tuple(1 << n for n in range(9, 18))


def _by_variant(run: Run) -> dict[str, list[SweepPoint]]:
    found: dict[str, list[SweepPoint]] = {}
    for point in sorted(run.done, key=lambda p: p.groups):
        found.setdefault(point.variant, []).append(point)
    return found


def _frontier(axes: Any, run: Run, cost: Callable[[SweepPoint], float | None], label: str) -> bool:
    drawn = False
    for color, (variant, points) in zip(COLORS * 9, _by_variant(run).items(), strict=False):
        known = [(cost(p), p) for p in points if cost(p) is not None and p.loss_difference is not None]
        if not known:
            continue
        drawn = True
        xs, ys = [x for x, _ in known], [p.loss_difference for _, p in known]
        bars = [
            [max(0.0, (p.loss_difference or 0) - (p.interval or (0, 0))[0]) for _, p in known],
            [max(0.0, (p.interval or (0, 0))[1] - (p.loss_difference or 0)) for _, p in known],
        ]
        axes.errorbar(xs, ys, yerr=bars, fmt="o", color=color, capsize=3, label=variant, markersize=6)
        for x, point in known:
            axes.annotate(
                f"{point.groups}", (x, point.loss_difference), textcoords="offset points", xytext=(7, 5), fontsize=9
            )
    if not drawn:
        return False
    best = {name: i for i, name in enumerate(frontier(run.points, cost))}
    line = sorted((p for p in run.done if p.name in best), key=lambda p: best[p.name])
    axes.plot([cost(p) for p in line], [p.loss_difference for p in line], "--", color="#8a8a8a", zorder=0)
    tolerance = run.sweep["recommendation"]["tolerance"]
    axes.axhline(tolerance, color="#d14a61", linewidth=1, linestyle=":", label=f"tolerance {tolerance:g}")
    axes.set_xlabel(label)
    axes.set_ylabel("loss rise, nats per token")
    axes.set_xlim(left=0)
    axes.legend(fontsize=9)
    return True


def frontier_cache(axes: Any, run: Run) -> bool:
    """Loss against the share of the cache that is left."""
    return _frontier(axes, run, lambda p: p.cache_ratio, "KV cache, share of the original's (labels: KV heads)")


def frontier_time(axes: Any, run: Run) -> bool:
    """Loss against decode time."""
    return _frontier(axes, run, lambda p: p.time_ratio, "decode time, share of the original's (labels: KV heads)")


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
    axes.set_xlabel(run.curves[0].unit)
    axes.set_ylabel("loss, nats per token")
    if any(curve.held_out for curve in run.curves):
        axes.legend(fontsize=9)
    return True


def layers(axes: Any, run: Run) -> bool:
    """Loss rise of converting one layer alone."""
    costs = run.layers.get("layers", ())
    if not costs:
        return False
    values = [cost["loss_difference"] for cost in costs]
    bars = [
        [max(0.0, cost["loss_difference"] - cost["interval"][0]) for cost in costs],
        [max(0.0, cost["interval"][1] - cost["loss_difference"]) for cost in costs],
    ]
    axes.bar(range(len(values)), values, color=COLORS[0], yerr=bars, error_kw={"ecolor": "#8a8a8a", "capsize": 2})
    axes.set_xlabel(f"layer (converted alone, as in {run.layers['point']})")
    axes.set_ylabel("loss rise, nats per token")
    axes.set_xticks(_ticks(len(values)))
    return True


def similarity(axes: Any, run: Run) -> bool:
    """Cosine between the heads of a group, before and after alignment."""
    found = run.similarity.get("layers", ())
    if not found:
        return False
    for color, part in zip(COLORS, ("keys", "values"), strict=False):
        for when, style in (("before", "o--"), ("after", "o-")):
            values = [layer[f"{part}_{when}"] for layer in found]
            label = f"{part}, {'as they stand' if when == 'before' else 'aligned'}"
            axes.plot(range(len(values)), values, style, color=color, markersize=4, label=label)
    axes.set_xlabel(f"layer (groups of adjacent heads, {run.similarity['groups']} KV heads)")
    axes.set_ylabel("cosine of heads in a group")
    axes.set_xticks(_ticks(len(found)))
    axes.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return True


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 12)))


def cache(axes: Any, run: Run) -> bool:
    """Cache of one sequence against context, for every number of KV heads."""
    sizes = {p.groups: p.cache_bytes_per_token for p in run.done if p.cache_bytes_per_token}
    models = [run.base.get("base", {})] + [c["model"] for e in run.evaluations for c in e["converted"]]
    sizes |= {m["kv_heads"]: m["kv_cache_bytes_per_token"] for m in models if m}
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


DRAWINGS: dict[str, Callable[[Any, Run], bool]] = {
    "frontier-cache": frontier_cache,
    "frontier-time": frontier_time,
    "uptraining": uptraining,
    "layers": layers,
    "similarity": similarity,
    "cache": cache,
}

TITLES = {
    "frontier-cache": "Quality against cache",
    "frontier-time": "Quality against decode time",
    "uptraining": "Uptraining",
    "layers": "What each layer costs by itself",
    "similarity": "How alike the heads of a group are",
    "cache": "Cache against context",
}
