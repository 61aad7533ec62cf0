"""Search for equal groups of KV heads that lose least.

Any equal grouping can be had, because query heads and o_proj columns move with their KV head. The cost of a grouping is
the sum of its groups' costs, and a group's cost is the merge method's own residual, so the search never has to merge
anything. K and V share the grouping, as they must in a plain grouped-query model.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gqa_convert.heads import Grouping
from gqa_convert.merge.apply import group_maps, method_options
from gqa_convert.merge.maps import residual

if TYPE_CHECKING:
    from gqa_convert.merge.moments import BlockMoments
    from gqa_convert.merge.options import MergeOptions
    from gqa_convert.merge.registry import MergeMethod

GroupCost = Callable[[tuple[int, ...]], float]
_RESTARTS = 16
_PRICED_STARTS = 3
_WIDE = 1024  # heads times head_dim


@dataclass
class CachedCost:
    """Cost of a group of heads, each set of heads computed once."""

    function: GroupCost
    known: dict[frozenset[int], float] = field(default_factory=dict)

    def __call__(self, members: Sequence[int]) -> float:
        """Cost of sharing `members`, whatever their order."""
        key = frozenset(members)
        if key not in self.known:
            self.known[key] = self.function(tuple(sorted(key)))
        return self.known[key]

    def total(self, groups: Sequence[Sequence[int]]) -> float:
        """Cost of a whole grouping."""
        return sum(self(group) for group in groups)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The grouping found, and its cost beside that of adjacent heads."""

    grouping: Grouping
    cost: float
    contiguous_cost: float
    evaluations: int
    """Sets of heads whose cost was computed."""
    exact: bool
    """No grouping is cheaper; otherwise no single swap that was tried makes it cheaper."""


def residual_cost(
    method: MergeMethod, moments: Sequence[BlockMoments], options: MergeOptions | None = None
) -> GroupCost:
    """Return the cost of a group: its key residual plus its value residual, each as a share of its layer's whole.

    The key residual is that of `BlockMoments.by_output`: a head of small output may have its scores disturbed.

    Give the moments of several layers where they must share one grouping (T5's position bias belongs to the heads of
    all its layers). The moments must have been computed with `method_options(method, options)`. Many or wide heads are
    priced in float32, which is exact enough to rank groups and twice as fast.
    """
    options = method_options(method, options)
    moments = [m.by_output() for m in moments]
    moments = [m.to(torch.float32) if m.values.mean.numel() > _WIDE else m for m in moments]
    totals = [[part or 1.0 for part in m.total] for m in moments]

    def cost(members: tuple[int, ...]) -> float:
        lost = 0.0
        for m, (key_total, value_total) in zip(moments, totals, strict=True):
            if method.cost is not None:
                keys, values = method.cost(m, members)
            else:
                keys, values = residual(m, members, group_maps(method, m, members, options))
            lost += keys / key_total + values / value_total
        return lost

    return cost


def search_grouping(
    num_heads: int, num_groups: int, cost: GroupCost, *, max_evaluations: int = 1000, seed: int = 0
) -> SearchResult:
    """Return a grouping of low cost, never above that of adjacent heads.

    Exact, by dynamic programming over sets of heads, where the sets are at most `max_evaluations` and the heads at most
    16. Else local search by swaps of two heads from several starts: swaps are tried in the order that the costs of
    pairs predict, until none helps or `max_evaluations` sets have been priced (pairs not counted).

    Raises:
        UsageError: if `num_groups` does not divide `num_heads`.
    """
    adjacent = Grouping.contiguous(num_heads, num_groups)
    size = adjacent.group_size
    cached = CachedCost(cost)
    contiguous_cost = cached.total(adjacent.members)
    exact = num_heads <= 16 and math.comb(num_heads, size) <= max_evaluations
    if num_groups == 1 or size == 1:
        groups: Sequence[Sequence[int]] = adjacent.members
    elif exact:
        groups = _exact(num_heads, size, cached)
    else:
        groups = _local(adjacent, cached, max_evaluations, random.Random(seed))
    if cached.total(groups) >= contiguous_cost:
        groups = adjacent.members
    grouping = Grouping(tuple(sorted(tuple(sorted(group)) for group in groups)))
    return SearchResult(
        grouping=grouping,
        cost=cached.total(grouping.members),
        contiguous_cost=contiguous_cost,
        evaluations=len(cached.known),
        exact=exact or num_groups == 1 or size == 1,
    )


def _exact(num_heads: int, size: int, cost: CachedCost) -> list[tuple[int, ...]]:
    """Best partition: best[taken] is the cheapest way to group the heads of the bit mask `taken`.

    The lowest head not taken always goes next, so each partition is met once.
    """
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, ())}
    level = [0]
    for _ in range(num_heads // size):
        following: set[int] = set()
        for taken in level:
            spent = best[taken][0]
            free = [h for h in range(num_heads) if not taken >> h & 1]
            for others in itertools.combinations(free[1:], size - 1):
                group = (free[0], *others)
                mask = taken | sum(1 << h for h in group)
                total = spent + cost(group)
                if mask not in best or total < best[mask][0]:
                    best[mask] = (total, taken, group)
                following.add(mask)
        level = sorted(following)
    groups, mask = [], (1 << num_heads) - 1
    while mask:
        _, mask, group = best[mask]
        groups.append(group)
    return groups


def _local(adjacent: Grouping, cost: CachedCost, max_evaluations: int, draw: random.Random) -> Sequence[Sequence[int]]:
    """Swap search on the predicted cost from many starts, then on the true cost from the best of them."""
    heads = range(adjacent.num_heads)
    pair = [[0.0 if i == j else cost((i, j)) for j in heads] for i in heads]

    def predicted(groups: Sequence[Sequence[int]]) -> float:
        return sum(pair[i][j] for group in groups for i, j in itertools.combinations(group, 2))

    starts = [[list(group) for group in adjacent.members], _greedy(adjacent, pair)]
    for _ in range(_RESTARTS):
        order = draw.sample(heads, len(heads))
        starts.append([order[i : i + adjacent.group_size] for i in range(0, len(order), adjacent.group_size)])
    for groups in starts[1:]:
        _descend_predicted(groups, pair)
    ranked = sorted(starts[1:], key=predicted)
    start = min([starts[0], *ranked[:_PRICED_STARTS]], key=cost.total)
    return _descend(start, pair, cost, len(cost.known) + max_evaluations)


def _greedy(adjacent: Grouping, pair: list[list[float]]) -> list[list[int]]:
    """Join clusters of heads by least mean pair cost while they fit, then deal what is left to the open places."""
    clusters = [[h] for h in range(adjacent.num_heads)]
    size = adjacent.group_size
    while True:
        joins = [
            (sum(pair[i][j] for i in a for j in b) / (len(a) * len(b)), x, y)
            for (x, a), (y, b) in itertools.combinations(enumerate(clusters), 2)
            if len(a) + len(b) <= size
        ]
        if not joins:
            break
        _, x, y = min(joins)
        clusters[x] += clusters.pop(y)
    clusters.sort(key=len, reverse=True)
    groups, rest = clusters[: adjacent.num_groups], clusters[adjacent.num_groups :]
    for h in itertools.chain.from_iterable(rest):
        open_groups = [group for group in groups if len(group) < size]
        min(open_groups, key=lambda group: sum(pair[h][i] for i in group)).append(h)
    return groups


def _swaps(groups: list[list[int]], pair: list[list[float]]) -> list[tuple[float, int, int, int, int]]:
    """Every swap of two heads of different groups as (predicted change, group, place, group, place), best first."""
    near = [[sum(pair[h][i] for i in group) for group in groups] for h in range(len(pair))]
    swaps = []
    for a, b in itertools.combinations(range(len(groups)), 2):
        for x, i in enumerate(groups[a]):
            for y, j in enumerate(groups[b]):
                change = near[i][b] + near[j][a] - near[i][a] - near[j][b] - 2 * pair[i][j]
                swaps.append((change, a, x, b, y))
    return sorted(swaps)


def _descend_predicted(groups: list[list[int]], pair: list[list[float]]) -> None:
    """Swap while the predicted cost falls; works in place."""
    while True:
        change, a, x, b, y = _swaps(groups, pair)[0]
        if change > -1e-12:
            return
        groups[a][x], groups[b][y] = groups[b][y], groups[a][x]


def _descend(start: Sequence[Sequence[int]], pair: list[list[float]], cost: CachedCost, limit: int) -> list[list[int]]:
    """Swap while the true cost falls, or until `limit` sets have been priced."""
    groups = [list(group) for group in start]
    improved = True
    while improved:
        improved = False
        for _, a, x, b, y in _swaps(groups, pair):
            if len(cost.known) >= limit:
                return groups
            one, other = list(groups[a]), list(groups[b])
            one[x], other[y] = other[y], one[x]
            if cost(one) + cost(other) < cost(groups[a]) + cost(groups[b]) - 1e-12:
                groups[a], groups[b] = one, other
                improved = True
                break
    return groups
