"""The verdict in a sentence. Imports no torch."""

from __future__ import annotations

from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.report.collect import Run


def verdict(run: Run) -> str:
    """Say what to take, and what it gains and costs; or that nothing fits, and what is nearest."""
    if not run.points:
        return _single(run)
    point = run.recommended
    if point is None:
        return str(run.sweep["recommendation"]["reason"])
    return f"Take {point.groups} KV heads by {point.variant}: {gains(point)}, and {cost(point, run)}."


def gains(point: SweepPoint) -> str:
    """What a point saves, in words."""
    text = f"the KV cache shrinks to {point.cache_ratio:.0%}"
    if point.time_ratio is None:
        return text
    if point.time_ratio < 0.97:
        return f"{text}, decoding takes {point.time_ratio:.2f} of the time"
    if point.time_ratio > 1.03:
        return f"{text}, but decoding is slower here (x {point.time_ratio:.2f})"
    return f"{text}, though decoding is no faster here"


def cost(point: SweepPoint, run: Run) -> str:
    """What a point costs, in words."""
    assert point.interval is not None
    tolerance = run.sweep["recommendation"]["tolerance"]
    return (
        f"the loss rises by {point.loss_difference:.4f} nats per token (95 % interval {point.interval[0]:.4f} to "
        f"{point.interval[1]:.4f}), within the tolerance of {tolerance:g}"
    )


def _single(run: Run) -> str:
    parts = []
    for evaluation in run.evaluations:
        for made in evaluation["converted"]:
            low, high = made["loss_difference_interval"]
            parts.append(
                f"{made['model']['name']}: the KV cache shrinks to {made['cache_ratio']:.0%}, and the loss changes by "
                f"{made['loss_difference']:+.4f} nats per token (95 % interval {low:+.4f} to {high:+.4f})."
            )
    parts += [line + ("" if line.endswith(".") else ".") for bench in run.benches for line in bench["conclusions"]]
    return " ".join(parts[:3]) or "An uptraining run; nothing was compared yet."
