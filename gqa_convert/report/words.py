"""The verdict in a sentence, and when it was measured. Imports no torch."""

from __future__ import annotations

from gqa_convert import __version__
from gqa_convert.evaluate.deals import better_quantised
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.sweep.points import SweepPoint, counted
from gqa_convert.report.collect import Run

_SAME = 0.03
"""Decode times this near to the original's are no difference, where no benchmark said so itself."""
_CONVERSIONS, _TIMINGS = 4, 2
"""Most that a sentence is said of, where models were measured without a sweep."""


def verdict(run: Run) -> str:
    """Say what to take, and what it gains and costs; or that nothing fits, and what is nearest."""
    if not run.points or run.recommendation is None:
        return _single(run)
    point = run.recommended
    if point is None:
        return run.recommendation.reason
    return f"Take {counted(point)} by {point.variant}: {gains(point)}, and {cost(point, run)}."


def gains(point: SweepPoint) -> str:
    """What a point saves, in words."""
    share = point.cache_ratio
    text = "the KV cache" + (" was not measured" if share is None else f" shrinks to {share:.0%}")
    time = point.figures.get("time_ratio")
    if time is None:
        return text
    said = time.verdict or _decode_verdict(time.value)
    if said == "faster":
        return f"{text}, decoding takes {time.value:.2f} of the time"
    if said == "slower":
        return f"{text}, but decoding is slower here (x {time.value:.2f})"
    return f"{text}, though decoding is no faster here"


def _decode_verdict(ratio: float) -> str:
    if ratio < 1 - _SAME:
        return "faster"
    return "slower" if ratio > 1 + _SAME else "no difference"


def cost(point: SweepPoint, run: Run) -> str:
    """What a point costs, in words."""
    assert run.recommendation is not None
    rise = point.loss_difference or 0.0
    low, high = point.interval or (rise, rise)
    interval = f"nats per token (95 % interval {low:.4f} to {high:.4f})"
    within = f"within the tolerance of {run.recommendation.tolerance:g}"
    if low <= 0 <= high:
        return f"the loss does not change measurably: {rise:+.4f} {interval}, {within}"
    if rise < 0:
        return f"the loss falls by {-rise:.4f} nats per token (95 % interval {-high:.4f} to {-low:.4f}), {within}"
    return f"the loss rises by {rise:.4f} {interval}, {within}"


def _single(run: Run) -> str:
    several = len({evaluation.data for evaluation in run.evaluations}) > 1
    shares: dict[str, float] = {}
    changes: dict[str, list[str]] = {}
    for evaluation in run.evaluations:
        for comparison in evaluation.converted:
            if not {"loss_difference", "cache_ratio"} <= comparison.figures.keys():
                continue
            name, (low, high) = comparison.model.name, comparison.loss_difference_interval
            shares.setdefault(name, comparison.figures["cache_ratio"].value)
            changes.setdefault(name, []).append(
                f"{comparison.loss_difference:+.4f} nats per token (95 % interval {low:+.4f} to {high:+.4f})"
                + (f" on {evaluation.data}" if several else "")
            )
    parts = [
        f"{name}: the KV cache shrinks to {shares[name]:.0%}, and the loss changes by {' and '.join(changes[name])}."
        for name in changes
    ]
    parts = parts[:_CONVERSIONS] + [_rather_quantised(evaluation, several) for evaluation in run.evaluations]
    timings = [pair for timed in run.benches for pair in enumerate(timed.conclusions)]
    parts += [line.rstrip(".") + "." for _, line in sorted(timings, key=lambda pair: pair[0])[:_TIMINGS]]
    return " ".join(filter(None, parts)) or "An uptraining run; nothing was compared yet."


def _rather_quantised(evaluation: Evaluation, several: bool) -> str:
    """For which conversions the original with a quantised cache is the better deal, if that was measured."""
    better = better_quantised(evaluation)
    if not better:
        return ""
    named = ", ".join(f"{name} ({cache})" for name, cache in better.items())
    where = f" on {evaluation.data}" if several else ""
    return (
        "To save cache alone, quantise the original's and do not convert: that is no larger and loses clearly less"
        f"{where} than {named}."
    )


def written_by(run: Run) -> str:
    """With what the page was written, and when its figures were measured."""
    days = sorted({e.date for e in (run.base, *run.evaluations) if e is not None and e.date})
    when = f" Measured on {days[0]}" + (f" to {days[-1]}." if len(days) > 1 else ".") if days else ""
    return f"Written by gqa report, gqa-convert {__version__}.{when}"
