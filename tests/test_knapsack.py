"""The exact choice within a budget, against every choice that there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_convert.budget.knapsack import cheapest
from gqa_convert.errors import UsageError

OPTIONS = st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.integers(-3, 50), min_size=1)


@settings(deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 900))
def test_it_is_the_best_of_all_choices(costs: list[dict[int, int]], scale: int, budget: int) -> None:
    weights = [{option: 16 * scale * option * (1 + n % 2) for option in some} for n, some in enumerate(costs)]

    def total(table: list[dict[int, int]], choice: tuple[int, ...]) -> int:
        return sum(some[option] for some, option in zip(table, choice, strict=True))

    fitting = [c for c in itertools.product(*costs) if total(weights, c) <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="the fewest KV heads that are allowed take"):
            cheapest(costs, weights, budget)
        return
    chosen = cheapest(costs, weights, budget)
    assert total(weights, chosen) <= budget
    assert total(costs, chosen) == min(total(costs, c) for c in fitting)
    assert total(weights, chosen) == min(total(weights, c) for c in fitting if total(costs, c) == total(costs, chosen))
