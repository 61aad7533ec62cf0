"""The cheapest choice of one option for each item within a budget: the multiple-choice knapsack, exactly. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

from gqa_convert.errors import UsageError


def cheapest(
    costs: Sequence[Mapping[int, float]], weights: Sequence[Mapping[int, int]], budget: int
) -> tuple[int, ...]:
    """Choose one option for each item so that the sum of costs is least and that of weights within the budget.

    By dynamic programming over the budget in units of the weights' greatest common divisor (Kellerer, Pferschy and
    Pisinger 2004, section 11.5). Of choices that cost the same the lightest is taken.

    Args:
        costs: of each item's options.
        weights: of the same options, in bytes, none negative.
        budget: in bytes.

    Returns:
        The option chosen for each item.

    Raises:
        UsageError: if not even the lightest options fit.
    """
    least = sum(min(options.values()) for options in weights)
    if least > budget:
        raise UsageError(f"a budget of {budget} bytes: the fewest KV heads that are allowed take {least}.")
    unit = math.gcd(*chain.from_iterable(options.values() for options in weights)) or 1
    room = min(budget, sum(max(options.values()) for options in weights)) // unit
    best: list[float] = [0.0] + [math.inf] * room  # least cost of the items so far at exactly so many units
    chosen: list[list[int | None]] = []
    for cost, weight in zip(costs, weights, strict=True):
        after = [math.inf] * (room + 1)
        option_at: list[int | None] = [None] * (room + 1)
        for option, price in cost.items():
            units = weight[option] // unit
            for total in range(units, room + 1):
                if best[total - units] + price < after[total]:
                    after[total] = best[total - units] + price
                    option_at[total] = option
        best = after
        chosen.append(option_at)
    total = min(range(room + 1), key=lambda units: (best[units], units))
    options: list[int] = []
    for weight, options_at in zip(reversed(weights), reversed(chosen), strict=True):
        best_option = options_at[total]
        assert best_option is not None
        options.append(best_option)
        total -= weight[best_option] // unit
    return tuple(reversed(options))
