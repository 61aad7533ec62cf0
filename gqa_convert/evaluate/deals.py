"""Whether a smaller cache is better had by converting, by storing it in fewer bits, or by both. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gqa_convert.evaluate.results import Comparison, Evaluation


def conclusions(evaluation: Evaluation) -> list[str]:
    """Say in words which is the better deal in bytes of cache and loss; nothing where no cache was quantised.

    Bytes are set against a cache in 16 bits, which models are served with, whatever the figures were measured in.
    A loss counts as higher only where its 95 % interval lies above the other's. Time is the benchmark's to say.
    """
    evaluation = _in_16_bits(evaluation)
    formats = _formats(evaluation)
    of_original = evaluation.quantised[:formats]
    lines = [f"{c.model.name}: {_price(c)}, {_loss_in_words(c)}." for c in of_original]
    for number, converted in enumerate(evaluation.converted, start=1):
        together = evaluation.quantised[number * formats : (number + 1) * formats]
        if together:
            lines.append(f"{converted.model.name}: {_deal(converted, of_original, together)}")
    return lines


def better_quantised(evaluation: Evaluation) -> dict[str, str]:
    """Conversions that a quantised cache of the original beats (no larger, clearly less loss), each with its format."""
    evaluation = _in_16_bits(evaluation)
    of_original = evaluation.quantised[: _formats(evaluation)]
    rivals = {converted.model.name: (converted, _rival(converted, of_original)) for converted in evaluation.converted}
    return {
        name: rival.model.cache
        for name, (converted, rival) in rivals.items()
        if rival and _clearly_less(rival, converted)
    }


def _formats(evaluation: Evaluation) -> int:
    return len({comparison.model.cache for comparison in evaluation.quantised})


def _rival(converted: Comparison, of_original: Sequence[Comparison]) -> Comparison | None:
    """The quantised original that is no larger than a conversion and loses least; None where all are larger."""
    as_small = [rival for rival in of_original if _ratio(rival) <= _ratio(converted)]
    return min(as_small, key=lambda rival: rival.loss_difference, default=None)


def _in_16_bits(evaluation: Evaluation) -> Evaluation:
    """The same, with quantised caches set against the original's in 16 bits where the models ran in 32."""
    if evaluation.dtype != "float32":
        return evaluation
    quantised = []
    for comparison in evaluation.quantised:
        ratio = comparison.figures["cache_ratio"]
        figures = comparison.figures | {"cache_ratio": replace(ratio, value=2 * ratio.value)}
        quantised.append(replace(comparison, figures=figures))
    return replace(evaluation, quantised=tuple(quantised))


def _deal(converted: Comparison, of_original: Sequence[Comparison], together: Sequence[Comparison]) -> str:
    rival = _rival(converted, of_original)
    price = _price(converted)
    if rival is None:
        smallest = min(of_original, key=_ratio)
        verdict = f"{price}; no cache of the original's is as small (the smallest is {_ratio(smallest):.2f})."
    else:
        beside = f"the original with its cache in {rival.model.cache} has {_price(rival)}"
        if _clearly_less(rival, converted):
            verdict = f"{price}; quantise the cache, do not convert for its size: {beside}."
        elif _clearly_less(converted, rival):
            verdict = f"{price}; converting is the better deal: {beside}."
        else:
            verdict = f"{price}; no clear difference in loss, and quantising needs no new weights: {beside}."
    kept = [both for both in together if not any(_beats(rival, both) for rival in of_original)]
    if not kept:
        return f"{verdict} Both together are no better: a quantised original is as small and loses less."
    best = min(kept, key=_ratio)
    return f"{verdict} Both together, with {best.model.cache}: {_price(best)}."


def _ratio(comparison: Comparison) -> float:
    return comparison.figures["cache_ratio"].value


def _clearly_less(one: Comparison, two: Comparison) -> bool:
    return one.loss_difference_interval[1] < two.loss_difference_interval[0]


def _beats(one: Comparison, two: Comparison) -> bool:
    return _ratio(one) <= _ratio(two) and _clearly_less(one, two)


def _price(comparison: Comparison) -> str:
    return f"{_ratio(comparison):.2f} of the 16-bit cache at {comparison.loss_difference:+.4f} nats per token"


def _loss_in_words(comparison: Comparison) -> str:
    low, high = comparison.loss_difference_interval
    return "a clear loss" if low > 0 else "a clear gain" if high < 0 else "no clear loss"
