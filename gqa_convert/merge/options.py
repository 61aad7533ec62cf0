"""What a user may choose about a merge. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Choices that more than one method reads."""

    max_context: int | None = None
    """Longest context, in tokens, that must stay sound after the low-frequency fold of `pca`; None: no fold."""
    fold_angle: float = 1.0
    """Fold the rotary pairs that turn by less than this many radians over `max_context`."""
    weighted: bool = True
    """Weigh keys by the queries that read them and values by o_proj; False is for comparison only."""
    renorm: bool = False
    """`aligned` only: scale each mean back to the size of its members."""
    seed: int = 0
    """Methods that draw only: see `MergeMethod.draws`."""
    key: str = ""
    """Methods that draw only: the path of the attention block, so that layers differ."""
