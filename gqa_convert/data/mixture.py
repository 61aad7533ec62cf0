"""Several sources mixed by weight: which source block i comes from, and which of its blocks it is, by arithmetic.

In every period of `sum(parts)` blocks each source has exactly its part of them, spread evenly, so the proportions hold
in every step and not on average alone. A position in the mixture is one integer: nothing is drawn, and neither the
number of processes nor where a run was interrupted changes what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.blocks import Block

LONGEST = 10_000
"""Blocks of a period at most; weights that need more are rounded to this many parts."""


class Component(Protocol):
    """A source's blocks."""

    def get(self, index: int) -> Block:
        """Return its block `index`."""
        ...


class Mixture:
    """Index arithmetic of a mixture.

    Args:
        weights: above 0; what counts is their proportion. Decimal fractions are taken as they are written.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.parts = _parts(weights)
        self.period = sum(self.parts)
        pattern = np.empty(self.period, np.int64)
        given = np.zeros(len(self.parts), np.int64)
        shares = np.array(self.parts, dtype=np.int64)
        for place in range(self.period):
            # Whoever is furthest behind its share; in whole numbers, so the same everywhere.
            source = int(np.argmax(shares * (place + 1) - given * self.period))
            pattern[place] = source
            given[source] += 1
        self._pattern = pattern
        before = np.stack([np.cumsum(pattern == source) - (pattern == source) for source in range(len(self.parts))])
        self._before: NDArray[np.int64] = before

    def locate(self, index: int) -> tuple[int, int]:
        """The source of block `index`, and which of that source's blocks it is."""
        number, place = divmod(index, self.period)
        source = int(self._pattern[place])
        return source, number * self.parts[source] + int(self._before[source, place])

    def passed(self, index: int) -> list[int]:
        """How many blocks of each source come before block `index`."""
        number, place = divmod(index, self.period)
        return [number * part + int(before[place]) for part, before in zip(self.parts, self._before, strict=True)]


def _parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights, as small as they can be and `LONGEST` in sum at most."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = lcm(*(share.denominator for share in shares))
    if period <= LONGEST:
        return tuple(int(share * period) for share in shares)
    parts = [max(1, int(share * LONGEST)) for share in shares]
    # What rounding down left over goes to those that lost most.
    order = sorted(range(len(shares)), key=lambda k: (parts[k] - shares[k] * LONGEST, k))
    for k in order[: max(0, LONGEST - sum(parts))]:
        parts[k] += 1
    return tuple(parts)


class MixedBlocks:
    """Blocks of several sources in the proportions of a mixture.

    Args:
        mixture: the arithmetic.
        components: each source's blocks, in the order of the mixture's weights.
    """

    def __init__(self, mixture: Mixture, components: Sequence[Component]) -> None:
        self.mixture, self.components = mixture, tuple(components)

    def get(self, index: int) -> Block:
        """Return block `index` of the training order."""
        source, inside = self.mixture.locate(index)
        return self.components[source].get(inside)

    def states(self, index: int) -> list[Any]:
        """Each component's own state for going on with block `index`; None for one that needs none."""
        return [
            component.state(inside) if hasattr(component, "state") else None
            for component, inside in zip(self.components, self.mixture.passed(index), strict=True)
        ]
