"""Numbers as text, and what they say beside the paper: each sentence follows from the figures by a stated rule."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from arms import ARMS
from curves import Interval
from findings import FIGURE_4, Findings, Saving


def nats(interval: Interval, *, sign: bool = False) -> str:
    """A mean with half the width of its interval."""
    text = f"{interval.mean:+.3f}" if sign else f"{interval.mean:.3f}"
    return text if interval.high is None else f"{text} ± {interval.high - interval.mean:.3f}"


def percent(interval: Interval) -> str:
    """A share with its interval."""
    text = f"{interval.mean:.0%}"
    return (
        text if interval.low is None or interval.high is None else f"{text} ({interval.low:.0%} to {interval.high:.0%})"
    )


def times(interval: Interval | None, *, at_least: bool = False) -> str:
    """A ratio with its interval."""
    if interval is None:
        return "not reached"
    text = f"{'≥ ' if at_least else ''}{interval.mean:.1f}"
    spread = interval.high is not None and interval.low is not None and interval.high - interval.low > 0.05
    return f"{text} ({interval.low:.1f} to {interval.high:.1f})" if spread else text


def count(tokens: float | None) -> str:
    """Tokens, rounded to a whole one."""
    return "never" if tokens is None else f"{tokens:,.0f}"


def order_of_figure_4(findings: Findings) -> str:
    """Whether mean is better than first, and first better than random, at alpha 0.05."""
    pairs = list(pairwise(FIGURE_4))
    said = []
    for better, worse in pairs:
        difference = findings.difference(worse, better, 0.05)
        names = [name.split("-")[0] for name in (better, worse)]
        said.append(f"{names[1]} minus {names[0]} is {nats(difference, sign=True)}{_sure(difference)}")
    gaps = [findings.difference(worse, better, 0.05) for better, worse in pairs]
    if all(gap.mean > 0 and gap.excludes_zero for gap in gaps):
        verdict = "**The paper's order, mean before first before random, holds.**"
    elif all(gap.mean > 0 for gap in gaps):
        verdict = "The paper's order holds on average, but not beyond the spread of the seeds."
    else:
        verdict = "**The paper's order, mean before first before random, does not hold here.**"
    return f"{verdict} At alpha 0.05, {'; '.join(said)}."


def _sure(interval: Interval) -> str:
    return "" if interval.excludes_zero else " (the interval includes 0)"


def _gained(findings: Findings, arm: str, start: float, end: float, seed: int) -> float:
    return findings.at(seed, arm, start) - findings.at(seed, arm, end)


def shape_of_figure_5(findings: Findings) -> list[str]:
    """Whether 5 % closes the gap, and what the second 5 % brings."""
    said = []
    for arm, name in (("mean-gqa-ce", "GQA"), ("mean-mqa-ce", "MQA")):
        closed, more = findings.closed(arm, 0.05), findings.closed(arm, 0.1)
        left = findings.gap(arm, 0.05)
        gain = findings.over_seeds(partial(_gained, findings, arm, 0.05, 0.1))
        first = findings.over_seeds(partial(_gained, findings, arm, 0.0, 0.05))
        diminishing = "as in the paper" if gain.mean < first.mean / 4 else "little"
        said.append(
            f"{name}: 5 % closes {percent(closed)} of the gap to the control, 10 % {percent(more)}; "
            f"{nats(left, sign=True)} nats are left at 5 %. The first 5 % bring {first.mean:.3f} nats, "
            f"the second {gain.mean:.3f}: returns diminish {diminishing}."
        )
    left = findings.gap("mean-gqa-ce", 0.05)
    if left.mean > 0 and left.excludes_zero:
        said.append(
            "**The paper's GQA is 0.1 points of 57.5 from the control at 5 %; here a gap remains that the seeds' "
            f"spread does not explain: {nats(left)} nats.** Nats and points do not compare. The paper also fine-tunes "
            "on the task before it measures, and its 5 % are fifty thousand steps."
        )
    return said


def speed(timed: dict[str, Any]) -> str:
    """How near GQA's time is to MQA's."""
    models = timed["models"]
    heads = max(model["kv_heads"] for model in models.values())
    by_groups = {model["kv_heads"]: model["seconds_per_sample"] for model in models.values()}
    mha, mqa = by_groups[heads], by_groups[1]
    said = [f"MHA takes {mha / mqa:.1f} times as long as MQA."]
    for groups in sorted(by_groups)[1:-1]:
        taken = (by_groups[groups] - mqa) / (mha - mqa) if mha > mqa else float("nan")
        said.append(f"{groups} groups: {by_groups[groups] / mqa:.2f} x MQA ({taken:.0%} of the way to MHA).")
    ordered = sorted(models.values(), key=lambda model: model["kv_heads"])
    unclear = [
        f"{fewer['kv_heads']} and {more['kv_heads']}"
        for fewer, more in pairwise(ordered)
        if more["quartiles"][0] < fewer["quartiles"][1]
    ]
    if unclear:
        said.append(f"The quartiles overlap for {', '.join(unclear)} groups: no order is claimed there.")
    return " ".join(said)


def left_out(findings: Findings) -> str:
    """The arms that are not finished for every seed; empty if there are none."""
    missing = [arm.name for arm in ARMS if not findings.has(arm.name)]
    missing += [f"MHA {size}" for size in ("small", "large") if size not in findings.sizes()]
    return f"Left out, because not every seed has finished them: {', '.join(missing)}." if missing else ""


def saving(saved: Saving) -> str:
    """How many fewer tokens, in a sentence."""
    if not saved.reached:
        return "it does not reach that loss"
    if saved.starts_there:
        return (
            "it starts below that loss: no uptraining is needed, and the ratio is bounded only by the first "
            f"evaluation (at least {saved.spent / saved.smallest:.0f})"
        )
    tokens = ", ".join(count(tokens) for tokens in saved.needed)
    return f"it needs {tokens} tokens (by seed) instead of {saved.spent:,.0f}: {times(saved.ratio)} times fewer"
