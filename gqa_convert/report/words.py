"""The verdict in a sentence, the commands to repeat, the versions. Imports no torch."""

from __future__ import annotations

import shlex

from gqa_convert import __version__
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.report.collect import Run

_SAME = 0.03
"""Decode times this near to the original's are no difference, where no benchmark said so itself."""


def verdict(run: Run) -> str:
    """Say what to take, and what it gains and costs; or that nothing fits, and what is nearest."""
    if not run.points or run.recommendation is None:
        return _single(run)
    point = run.recommended
    if point is None:
        return run.recommendation.reason
    return f"Take {point.groups} KV heads by {point.variant}: {gains(point)}, and {cost(point, run)}."


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
    parts = []
    for evaluation in run.evaluations:
        for comparison in evaluation.converted:
            if not {"loss_difference", "cache_ratio"} <= comparison.figures.keys():
                continue
            low, high = comparison.loss_difference_interval
            parts.append(
                f"{comparison.model.name}: the KV cache shrinks to {comparison.figures['cache_ratio'].value:.0%}, and "
                f"the loss changes by {comparison.loss_difference:+.4f} nats per token (95 % interval {low:+.4f} to "
                f"{high:+.4f})."
            )
    parts += [line + ("" if line.endswith(".") else ".") for timed in run.benches for line in timed.conclusions]
    return " ".join(parts[:3]) or "An uptraining run; nothing was compared yet."


def commands(run: Run) -> list[str]:
    """The commands that measure all of it again, put together from what the files record; names stand for paths."""
    lines = []
    if run.points and run.base is not None and run.recommendation is not None:
        groups = dict.fromkeys(str(point.groups) for point in run.points)
        variants = dict.fromkeys(point.variant for point in run.points)
        recipes = [detail.recipe for detail in run.details.values()]
        calibrate = next((str(r["calibrate"]) for r in recipes if r.get("calibrate")), "")
        words = ["gqa", "sweep", run.base.base.name, "--groups", ",".join(groups), "--methods", ",".join(variants)]
        words += [*_cut(run.base), "--tolerance", f"{run.recommendation.tolerance:g}"]
        words += ["--calibrate", calibrate] if calibrate else []
        lines.append(shlex.join([*words, "--run", run.folder.resolve().name]))
    for evaluation in run.evaluations:
        converted = [comparison.model.name for comparison in evaluation.converted]
        lines.append(shlex.join(["gqa", "eval", evaluation.base.name, *converted, *_cut(evaluation)]))
    for timed in run.benches:
        points = timed.bench.points
        names = dict.fromkeys(model.name for point in points for model in point.models)
        words = ["gqa", "bench", *names, "--batch", ",".join(dict.fromkeys(str(p.batch) for p in points))]
        words += ["--context", ",".join(dict.fromkeys(str(p.context) for p in points))]
        words += ["--cache", ",".join(dict.fromkeys(p.cache for p in points))]
        words += ["--steps", str(timed.bench.steps), "--rounds", str(timed.bench.rounds)]
        lines.append(shlex.join([*words, "--dtype", timed.bench.dtype]))
    if lines:
        lines.append(shlex.join(["gqa", "report", run.folder.resolve().name]))
    return lines


def _cut(evaluation: Evaluation) -> list[str]:
    """The options that say on what was measured."""
    settings = evaluation.settings
    words = ["--data", evaluation.data, "--context", str(evaluation.context), "--stride", str(evaluation.stride)]
    for name in ("field", "separator"):
        if settings.get(name) not in (None, "", "text"):
            words += [f"--{name}", str(settings[name])]
    words += ["--max-windows", str(settings["max_windows"])] if settings.get("max_windows") else []
    words += [f"--no-{name}" for name in ("special", "eos") if settings.get(name) is False]
    return [*words, "--dtype", evaluation.dtype]


def written_by(run: Run) -> str:
    """With what the page was written, and when its figures were measured."""
    days = sorted({e.date for e in (run.base, *run.evaluations) if e is not None and e.date})
    when = f" Measured on {days[0]}" + (f" to {days[-1]}." if len(days) > 1 else ".") if days else ""
    return f"Written by gqa report, gqa-convert {__version__}.{when}"
