"""Bootstrap intervals of token means, resampled by whole windows.

Tokens of one window are not independent, windows nearly are; a difference between two models is resampled in pairs, so
what makes one window hard for both cancels out (Koehn 2004; Efron and Tibshirani 1993, chapter 13). Windows that
overlap read some of the same text, so neighbours go together: circular blocks (Politis and Romano 1992).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return asdict(self)


def mean_per_token(sums: Sequence[float], tokens: Sequence[int], *, block: int = 1, seed: int = 0) -> Estimate:
    """Estimate `sum(sums) / sum(tokens)` over windows.

    For a paired difference pass the difference of the two models' sums, window by window. With a single window the
    bounds are the value itself.

    Args:
        sums: of each window, in the order of the text.
        tokens: of each window.
        block: neighbouring windows that are drawn together; 1 where they share no text.
        seed: of the draws.
    """
    return means_per_token([sums], tokens, block=block, seed=seed)[0]


def means_per_token(
    columns: Sequence[Sequence[float]], tokens: Sequence[int], *, block: int = 1, seed: int = 0
) -> list[Estimate]:
    """The same for several sums over the same windows, which are drawn once for all."""
    top_CW = torch.tensor(columns, dtype=torch.float64)
    bottom_W = torch.tensor(tokens, dtype=torch.float64)
    count = len(bottom_W)
    generator = torch.Generator().manual_seed(seed)
    means = []
    step = max(1, (1 << 22) // count)
    offsets = torch.arange(block)
    for done in range(0, RESAMPLES, step):
        # Blocks that reach past the last window go on with the first; what is drawn too many is cut off.
        starts = torch.randint(count, (min(step, RESAMPLES - done), -(-count // block)), generator=generator)
        chosen = ((starts[..., None] + offsets) % count).flatten(1)[:, :count]
        below = bottom_W[chosen].sum(1)
        means.append(torch.stack([top_W[chosen].sum(1) / below for top_W in top_CW]))
    tail = (1 - LEVEL) / 2
    bounds = torch.cat(means, 1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=1)
    values = [float(top_W.sum() / bottom_W.sum()) for top_W in top_CW]
    return [Estimate(value, *pair) for value, pair in zip(values, bounds.T.tolist(), strict=True)]
