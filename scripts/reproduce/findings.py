"""What the figures say, computed from the curves of all seeds: intervals, orders, ratios. No text, no drawing.

A family's `found` is what `Chain.run` returns, by seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curves import Interval, geometric_interval, interval, loss_at, tokens_to_reach

Found = dict[int, dict[str, Any]]

FIGURE_4 = ("mean-mqa-ce", "first-mqa-ce", "random-mqa-ce")
CONTROL = "control-ce"
FIGURE_5 = (CONTROL, "mean-gqa-ce", "mean-mqa-ce")
STARTS = ("mean", "first", "random", "aligned", "pca", "best")


class Findings:
    """One family's numbers.

    Args:
        seeds: what was found, by seed.
        pretraining_tokens: what alpha is a share of.
    """

    def __init__(self, seeds: Found, pretraining_tokens: int) -> None:
        self.found, self.total = seeds, pretraining_tokens

    def curve(self, seed: int, arm: str) -> list[tuple[float, float]]:
        """A run's held-out loss by tokens."""
        return [(tokens, loss) for tokens, loss in self.found[seed]["arms"][arm]["curve"]]

    def has(self, arm: str) -> bool:
        """Whether every seed has this arm."""
        return all(arm in results["arms"] for results in self.found.values())

    def arms(self, groups: str) -> list[str]:
        """The arms with so many groups that every seed has."""
        named = next(iter(self.found.values()))["arms"].items()
        return [name for name, arm in named if arm["groups"] == groups and self.has(name)]

    def alphas(self, arm: str) -> list[float]:
        """Where an arm was evaluated."""
        seed = next(iter(self.found))
        return [tokens / self.total for tokens, _ in self.curve(seed, arm)]

    def over_seeds(self, value: Callable[[int], float]) -> Interval:
        """The interval of a number that every seed has."""
        return interval([value(seed) for seed in self.found])

    def loss(self, arm: str, alpha: float) -> Interval:
        """Held-out loss of an arm."""
        return self.over_seeds(lambda seed: self.at(seed, arm, alpha))

    def at(self, seed: int, arm: str, alpha: float) -> float:
        """One seed's."""
        return loss_at(self.curve(seed, arm), alpha * self.total)

    def difference(self, arm: str, other: str, alpha: float) -> Interval:
        """Loss of an arm minus another's at the same alpha, seed by seed."""
        return self.over_seeds(lambda seed: self.at(seed, arm, alpha) - self.at(seed, other, alpha))

    def gap(self, arm: str, alpha: float) -> Interval:
        """Loss of an arm minus the control's, which saw the same tokens."""
        return self.difference(arm, CONTROL, alpha)

    def closed(self, arm: str, alpha: float, start: float = 0.0) -> Interval:
        """Share of the gap at `start` to the control that is gone at `alpha`."""

        def share(seed: int) -> float:
            gaps = [self.at(seed, arm, a) - self.at(seed, CONTROL, a) for a in (start, alpha)]
            return 1 - gaps[1] / gaps[0]

        return self.over_seeds(share)

    def pretrained(self, size: str) -> Interval:
        """Held-out loss at the end of pretraining."""
        return self.over_seeds(lambda seed: self.found[seed]["pretraining"][size]["curve"][-1][1])

    def sizes(self) -> list[str]:
        """The sizes that every seed has: seeds differ too much for means over others to compare."""
        return [
            size
            for size in ("small", "large")
            if all(size in results["pretraining"] for results in self.found.values())
        ]

    def saving(self, arm: str, reference: str, alpha: float = 0.05) -> Saving:
        """How many fewer uptraining tokens an arm needs for the loss that `reference` has at `alpha`."""
        spent = alpha * self.total
        needed, converting, seconds = [], 0, []
        for seed in self.found:
            target = self.at(seed, reference, alpha)
            needed.append(tokens_to_reach(self.curve(seed, arm), target))
            converting = self.found[seed]["arms"][arm].get("calibration_tokens", 0)
            seconds.append(self._time_ratio(seed, arm, reference, alpha, needed[-1]))
        return Saving(
            spent=spent,
            needed=tuple(needed),
            calibration_tokens=converting,
            smallest=self.curve(next(iter(self.found)), arm)[1][0],
            time_ratios=tuple(seconds),
        )

    def tokens_for_start(self, reference: str, arm: str) -> list[float | None]:
        """Tokens, by seed, that `reference` is trained on until it has the loss `arm` starts from."""
        return [tokens_to_reach(self.curve(seed, reference), self.curve(seed, arm)[0][1]) for seed in self.found]

    def _time_ratio(self, seed: int, arm: str, reference: str, alpha: float, needed: float | None) -> float | None:
        """Seconds of converting and uptraining: the reference's up to `alpha` over the arm's up to its goal."""
        if needed is None:
            return None
        own, other = (self.found[seed]["arms"][name] for name in (arm, reference))
        rates = [a["seconds"] / a["curve"][-1][0] for a in (own, other)]
        mine = own.get("conversion_seconds", 0.0) + rates[0] * needed
        theirs = other.get("conversion_seconds", 0.0) + rates[1] * alpha * self.total
        return float(theirs / mine)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A comparison of token counts.

    Attributes:
        spent: tokens of the reference.
        needed: the arm's, by seed; 0 where it starts at the goal, None where it never gets there.
        calibration_tokens: that the conversion read, which are no uptraining but are tokens.
        smallest: the smallest count at which the arm was evaluated: nothing between it and 0 is resolved.
        time_ratios: seconds, conversion included, by seed.
    """

    spent: float
    needed: tuple[float | None, ...]
    calibration_tokens: int
    smallest: float
    time_ratios: tuple[float | None, ...]

    @property
    def reached(self) -> bool:
        """Whether every seed got there."""
        return all(tokens is not None for tokens in self.needed)

    @property
    def starts_there(self) -> bool:
        """Whether every seed has the goal before the first step: there is no ratio, only a bound."""
        return all(tokens == 0 for tokens in self.needed)

    @property
    def ratio(self) -> Interval | None:
        """Tokens over tokens, at most `spent / smallest` a seed (below the first evaluation nothing is resolved)."""
        if not self.reached:
            return None
        return geometric_interval([self.spent / max(tokens or 0.0, self.smallest) for tokens in self.needed])

    @property
    def ratio_with_calibration(self) -> Interval | None:
        """The same with the tokens that the conversion was calibrated on counted as the arm's."""
        if not self.reached:
            return None
        return geometric_interval(
            [self.spent / max((tokens or 0.0) + self.calibration_tokens, self.smallest) for tokens in self.needed]
        )

    @property
    def time_ratio(self) -> Interval | None:
        """Seconds over seconds, conversion included."""
        ratios = [ratio for ratio in self.time_ratios if ratio is not None]
        return geometric_interval(ratios) if len(ratios) == len(self.time_ratios) else None
