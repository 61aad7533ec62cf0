"""Loss curves: where one reaches a loss, and what three seeds say about a number. Pure arithmetic.

A curve is a list of (tokens, loss) from 0 tokens on; an interval is a mean with its 95 % bounds over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Curve = Sequence[tuple[float, float]]

# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bounds; the bounds are None where there is one value only."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the bounds lie on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values (one a seed).

    Raises:
        ValueError: if there is none, or more than ten.
    """
    count = len(values)
    if not 1 <= count <= len(_T95) + 1:
        raise ValueError(f"{count} values: 1 to {len(_T95) + 1} seeds are expected.")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = _T95[count - 2] * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def geometric_interval(values: Sequence[float]) -> Interval:
    """The interval of positive ratios: taken of their logarithms."""
    of_logarithms = interval([math.log(value) for value in values])
    return Interval(
        math.exp(of_logarithms.mean),
        None if of_logarithms.low is None else math.exp(of_logarithms.low),
        None if of_logarithms.high is None else math.exp(of_logarithms.high),
    )


def loss_at(curve: Curve, tokens: float) -> float:
    """The loss after `tokens`, between two points by the logarithm of tokens (before the first one, by tokens).

    Raises:
        ValueError: if the curve does not reach that far.
    """
    for (before, loss), (after, next_loss) in pairwise(curve):
        if before <= tokens <= after:
            return loss + (next_loss - loss) * _share(before, after, tokens)
    if curve and tokens == curve[-1][0]:
        return curve[-1][1]
    raise ValueError(f"{tokens} tokens: the curve ends at {curve[-1][0] if curve else 'nothing'}.")


def tokens_to_reach(curve: Curve, target: float) -> float | None:
    """The first token count at which a curve is at or below `target`; 0 if it starts there, None if it never is."""
    if curve[0][1] <= target:
        return 0.0
    for (before, loss), (after, next_loss) in pairwise(curve):
        if next_loss <= target:
            share = (loss - target) / (loss - next_loss)
            return _tokens(before, after, share)
    return None


def _share(before: float, after: float, tokens: float) -> float:
    if before <= 0:
        return tokens / after
    return math.log(tokens / before) / math.log(after / before)


def _tokens(before: float, after: float, share: float) -> float:
    if before <= 0:
        return after * share
    return float(before * (after / before) ** share)
