"""The commands that measure a run again, put together from what its files record. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from gqa_convert.conversion.recipe import PRESETS
from gqa_convert.evaluate.metrics import suite_kind
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.sweep.points import Recommendation
from gqa_convert.report.collect import Run, Timed


def commands(run: Run) -> list[str]:
    """One line per command; files record names and no paths, so the reader's own stand in their place."""
    lines = []
    if run.points and run.base is not None and run.recommendation is not None:
        lines.append(_sweep(run, run.base, run.recommendation))
    for evaluation in run.evaluations:
        names = [evaluation.base.name, *(comparison.model.name for comparison in evaluation.converted)]
        lines.append(shlex.join(["gqa", "eval", *map(_named, names), *_data(evaluation)]))
    lines += [_bench(timed) for timed in run.benches]
    if lines:
        lines.append(shlex.join(["gqa", "report", _named(run.folder.resolve().name)]))
    return lines


def _sweep(run: Run, base: Evaluation, recommendation: Recommendation) -> str:
    words = ["gqa", "sweep", _named(base.base.name)]
    even = [point.groups for point in run.points if not point.budget]
    words += ["--groups", _list(even)] if even else []
    budgets = [point.budget for point in run.points if point.budget]
    words += [f"--kv-budget={_list(budgets)}"] if budgets else []
    words += [f"--methods={_list(point.variant for point in run.points)}", *_data(base)]
    words += ["--tolerance", f"{recommendation.tolerance:g}"]
    chosen = [run.details[point.name].recipe for point in run.points if point.variant not in PRESETS]
    own = [(run.details[p.name].recipe, PRESETS[p.variant][1]) for p in run.points if p.variant in PRESETS]
    chosen += [recipe for recipe, preset in own if recipe.get("calibrate") != preset.calibrate]
    calibrate = next((str(recipe["calibrate"]) for recipe in chosen if recipe.get("calibrate")), None)
    words += [f"--calibrate={calibrate}"] if calibrate else []
    words += ["--refit"] if any(recipe.get("refit") is True for recipe in chosen) else []
    timed = next((detail.timed for detail in run.details.values() if detail.timed is not None), None)
    if timed is None:
        words.append("--no-bench")
    else:
        points = timed.bench.points
        words += ["--batch", _list(point.batch for point in points)]
        words += ["--cache-context", _list(point.context for point in points)]
    return shlex.join([*words, "--out", _named(run.folder.resolve().name)])


def _bench(timed: Timed) -> str:
    points = timed.bench.points
    names = dict.fromkeys(model.name for point in points for model in point.models)
    words = ["gqa", "bench", *map(_named, names), "--batch", _list(point.batch for point in points)]
    words += ["--cache-context", _list(point.context for point in points)]
    words.append(
        f"--engine={timed.bench.engine}" if timed.bench.engine else f"--cache={_list(p.cache for p in points)}"
    )
    memories = [each.memory_bytes for each in timed.bench.throughputs]
    words += ["--cache-memory", str(memories[0])] if memories else []
    words += ["--steps", str(timed.bench.steps), "--rounds", str(timed.bench.rounds)]
    return shlex.join(words if timed.bench.engine else [*words, f"--dtype={timed.bench.dtype}"])


def _data(evaluation: Evaluation) -> list[str]:
    """The options that say what was measured on."""
    settings = evaluation.settings
    words = [f"--data={evaluation.data}", "--context", str(evaluation.context), "--stride", str(evaluation.stride)]
    for name, usual in (("field", "text"), ("separator", "")):
        if settings.get(name, usual) not in (None, usual):
            words.append(f"--{name}={settings[name]}")
    words += ["--max-windows", str(settings.get("max_windows") or 0)]
    words += [f"--no-{name}" for name in ("special", "eos") if settings.get(name) is False]
    if evaluation.quantised:
        words.append(f"--quantised-cache={_list(comparison.model.cache for comparison in evaluation.quantised)}")
    if evaluation.suite:
        kinds = [suite_kind(each.kind) for each in evaluation.suite]
        most = max(len(each.scores) for each in evaluation.suite)
        words += ["--suite", f"--suite-kinds={_list(kinds)}", "--suite-items", str(most)]
        words += ["--suite-seed", str(settings.get("suite_seed", 0))]
    if evaluation.recall:
        words.append(f"--recall={_list(result.context for result in evaluation.recall)}")
        words += ["--recall-items", str(len(evaluation.recall[0].right))]
    return [*words, f"--dtype={evaluation.dtype}"]


def _list(values: Iterable[object]) -> str:
    return ",".join(dict.fromkeys(map(str, values)))


def _named(name: str) -> str:
    """A name that is not read as an option."""
    return f"./{name}" if name.startswith("-") else name
