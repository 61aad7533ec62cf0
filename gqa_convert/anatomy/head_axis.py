"""How the KV heads lie along one axis of one tensor, before and after the merge, and the merge itself.

Shape suffixes: K source KV heads, G groups, H query heads, D head_dim, X everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from gqa_convert.heads import Grouping, merge_heads, split_heads

if TYPE_CHECKING:
    from torch import Tensor

    Pool = Callable[[Tensor, Grouping, int], Tensor]


Layout = Literal["heads", "concat", "per_head"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The heads along axis `dim` of a tensor.

    `layout` is `heads` (the axis is K * head_dim), or for a fused projection `concat` ([all q | all k | all v]) or
    `per_head` ([q k v] for each head); `target_layout` is that of the merged tensor. A fused axis also holds
    `query_heads` query heads, which no merge touches.
    """

    dim: int
    heads: int
    groups: int
    head_dim: int
    layout: Layout = "heads"
    target_layout: Layout = "heads"
    query_heads: int = 0

    def __post_init__(self) -> None:
        for layout in (self.layout, self.target_layout):
            if layout not in get_args(Layout):
                raise ValueError(f"{layout!r}: no layout of heads; one of {', '.join(get_args(Layout))} is.")

    @property
    def size(self) -> int:
        """Length of the axis before the merge."""
        return (self.query_heads + self._parts * self.heads) * self.head_dim

    @property
    def target_size(self) -> int:
        """Length of the axis after the merge."""
        return (self.query_heads + self._parts * self.groups) * self.head_dim

    @property
    def kv_size(self) -> int:
        """Part of the axis that is keys or values, before the merge."""
        return self._parts * self.heads * self.head_dim

    @property
    def kv_target_size(self) -> int:
        """Part of the axis that is keys or values, after the merge."""
        return self._parts * self.groups * self.head_dim

    @property
    def _parts(self) -> int:
        return 1 if self.layout == "heads" else 2

    def with_heads(self, kv_heads: int) -> Rows:
        """The tensor as it is with `kv_heads`: in the source's layout if that is all heads, else in the target's."""
        layout = self.layout if kv_heads == self.heads else self.target_layout
        return replace(self, heads=kv_heads, groups=kv_heads, layout=layout, target_layout=layout)

    def grouping(self) -> Grouping:
        """The contiguous grouping of these heads."""
        return Grouping.contiguous(self.heads, self.groups)

    def target_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the merged tensor."""
        return (*shape[: self.dim], self.target_size, *shape[self.dim + 1 :])

    def merge(self, x: Tensor, pool: Pool, grouping: Grouping | None = None) -> Tensor:
        """Merge the KV heads of `x` with `pool(x, grouping, dim)`; query rows pass through bit for bit."""
        grouping = grouping or self.grouping()
        if self.layout == "heads":
            return pool(x, grouping, self.dim)
        q, k, v = self.split(x)
        return self.join(q, pool(k, grouping, self.dim), pool(v, grouping, self.dim))

    def expand(self, x: Tensor) -> Tensor:
        """Undo a merge: repeat every merged KV head for each of its source heads, in the source's layout."""
        if self.layout == "heads":
            return self._repeat(x)
        target = replace(self, heads=self.groups, layout=self.target_layout, target_layout=self.layout)
        q, k, v = target.split(x)
        return target.join(q, self._repeat(k), self._repeat(v))

    def _repeat(self, x: Tensor) -> Tensor:
        heads = split_heads(x, self.groups, self.dim)
        return merge_heads(heads.repeat_interleave(self.heads // self.groups, dim=self.dim), self.dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut a fused axis in the source's layout into its q, k and v parts, heads in order."""
        heads = split_heads(x, self.query_heads + 2 * self.heads, self.dim)
        if self.layout == "concat":
            q, k, v = heads.split([self.query_heads, self.heads, self.heads], dim=self.dim)
        else:
            q, k, v = heads.unflatten(self.dim, (self.heads, 3)).unbind(self.dim + 1)
        return merge_heads(q, self.dim), merge_heads(k, self.dim), merge_heads(v, self.dim)

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Lay q, k and v parts out in the target's fused layout."""
        import torch

        if self.target_layout == "concat":
            return torch.cat([q, k, v], dim=self.dim)
        parts = [split_heads(part, self.query_heads, self.dim) for part in (q, k, v)]
        return merge_heads(torch.stack(parts, dim=self.dim + 1).flatten(self.dim, self.dim + 1), self.dim)
