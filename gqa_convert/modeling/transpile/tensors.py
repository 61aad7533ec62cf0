"""The tensor mathematics of transpiling: pure functions; torch is imported inside them only.

Shape suffixes: H heads, D head_dim, R rotary part of D, X input width, O output width, B blocks of heads.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gqa_convert.heads import merge_heads, split_heads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_ROWS = 1024  # of a weight that are widened to float64 at a time


def zeros(size: int) -> Tensor:
    """A bias that adds nothing."""
    import torch

    return torch.zeros(size)


def ones(size: int) -> Tensor:
    """A scale that changes nothing."""
    import torch

    return torch.ones(size)


def fold_scale(weight_OX: Tensor, scale_X: Tensor) -> Tensor:
    """Let a linear layer do the scaling of the norm before it: W diag(s), float32.

    The product of two half-precision numbers is exact in float32, so only storing it rounds.
    """
    return weight_OX.float() * scale_X.float()


def fold_shift(weight_OX: Tensor, shift_X: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Let a linear layer do the shifting of the norm before it: W b + its own bias, in float64."""
    import torch

    shifted = torch.cat([rows.double() @ shift_X.double() for rows in weight_OX.split(_ROWS)])
    return shifted if bias_O is None else shifted + bias_O.double()


def per_head(x: Tensor, heads: int, which: int) -> Tensor:
    """Take q (0), k (1) or v (2) out of rows that hold [q k v] for each head in turn: H*3*D rows -> H*D rows."""
    rows_HTD = split_heads(split_heads(x, heads), 3, 1)
    return merge_heads(rows_HTD[:, which])


def joined_per_head(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Undo `per_head`: H*D rows each of q, k and v -> H*3*D rows."""
    import torch

    return merge_heads(merge_heads(torch.stack([split_heads(x, heads) for x in (q, k, v)], dim=1)))


def halves_first(x: Tensor, heads: int, rotary: int) -> Tensor:
    """Re-order rows from rotary pairs (2i, 2i+1) to (i, i + R/2): the same rotation in the other convention.

    `x` has H*D rows, the first `rotary` of each head rotary. Scores do not change where q and k both move.
    """
    import torch

    rows = split_heads(x, heads)
    turned, rest = rows[:, :rotary], rows[:, rotary:]
    return merge_heads(torch.cat([turned[:, 0::2], turned[:, 1::2], rest], dim=1))


def from_blocks(x: Tensor, blocks: int, which: int) -> Tensor:
    """Take part `which` of three out of rows cut into blocks that each hold all three for their share of the heads."""
    rows_BTX = split_heads(split_heads(x, blocks), 3, 1)
    return merge_heads(rows_BTX[:, which])


def rows(make: Callable[..., Any], *arguments: Any) -> Callable[[Tensor], Tensor]:
    """A function of one tensor that selects and orders its rows; the numbers keep their bits."""
    return partial(_applied, make, arguments)


def _applied(make: Callable[..., Tensor], arguments: tuple[Any, ...], x: Tensor) -> Tensor:
    return make(x, *arguments)
