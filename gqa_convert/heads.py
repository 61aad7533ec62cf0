"""Attention heads: how many, how wide, and which of them share a group.

This is the one place that reshapes heads. Shape suffixes: K source KV heads, G groups (= KV heads after conversion),
R heads in a gRoup (K = G * R), D head_dim, X everything else.

The layout is that of `transformers`' `repeat_kv`: query head h reads KV head h // (H / G), so a group is a run of
adjacent heads (Ainslie et al. 2023, section 2.2). Pooling strided heads instead is the classic silent fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def divisors(number: int) -> tuple[int, ...]:
    """Return every divisor of `number`, ascending."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


@dataclass(frozen=True)
class HeadPlan:
    """KV heads of every decoder layer, first to last, where layers differ in them.

    Raises:
        UsageError: if it names no layer, or a layer without a KV head.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        low = next((layer for layer, count in enumerate(self.counts) if count < 1), None)
        if low is not None:
            raise UsageError(f"layer {low}: {self.counts[low]} KV heads; attention needs at least one.")
        if not self.counts:
            raise UsageError("KV heads of no layer: at least one layer's are needed.")

    @property
    def most(self) -> int:
        """KV heads of the layer that has most."""
        return max(self.counts)

    @property
    def fewest(self) -> int:
        """KV heads of the layer that has fewest."""
        return min(self.counts)

    @property
    def even(self) -> int | None:
        """KV heads of every layer; None where layers differ."""
        return self.most if self.most == self.fewest else None

    def __str__(self) -> str:
        return ",".join(map(str, self.counts))


Groups = int | HeadPlan
"""KV heads after a conversion: of every layer alike, or of each."""


def groups_at(groups: Groups, layer: int) -> int:
    """KV heads of one layer."""
    return groups if isinstance(groups, int) else groups.counts[layer]


def most_groups(groups: Groups) -> int:
    """KV heads of the layer that has most."""
    return groups if isinstance(groups, int) else groups.most


def fewest_groups(groups: Groups) -> int:
    """KV heads of the layer that has fewest."""
    return groups if isinstance(groups, int) else groups.fewest


def kv_heads_words(most: int, per_layer: Sequence[int] = ()) -> str:
    """KV heads in words: `8`, or `1 to 8 (3.25 on average)` where layers differ."""
    if not per_layer:
        return str(most)
    return f"{min(per_layer)} to {most} ({sum(per_layer) / len(per_layer):.3g} on average)"


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Head counts of the attention layers of a decoder.

    `per_layer` holds the KV heads of each layer where they differ; `num_kv_heads` are then those of the layer that has
    most.

    Raises:
        UsageError: if a count is not positive or the query heads cannot be shared equally by the KV heads.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    per_layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_query_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.num_query_heads % self.num_kv_heads:
            raise UsageError(
                f"{self.num_query_heads} query heads cannot be shared by {self.num_kv_heads} KV heads. "
                f"Choose one of {', '.join(map(str, divisors(self.num_query_heads)))}."
            )

    @property
    def group_size(self) -> int:
        """Query heads that read one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def kind(self) -> str:
        """`MHA`, `GQA` or `MQA`; layers that differ are `GQA` together."""
        if self.per_layer:
            return "GQA"
        if self.num_kv_heads == self.num_query_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    @property
    def kv_heads_words(self) -> str:
        """The KV heads in words: `8`, or `1 to 8 (3.25 on average)` where layers differ."""
        return kv_heads_words(self.num_kv_heads, self.per_layer)

    @property
    def legal_groups(self) -> tuple[int, ...]:
        """KV-head counts this layout can be converted to, the present one included."""
        return divisors(self.num_kv_heads)


@dataclass(frozen=True)
class Grouping:
    """Which source KV heads share a group: `members[g]` lists the heads of group g, in the order they are written.

    Raises:
        UsageError: if the groups are not equal in size or do not cover every head exactly once.
    """

    members: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        flat = sorted(head for group in self.members for head in group)
        if flat != list(range(len(flat))) or len({len(group) for group in self.members}) != 1:
            raise UsageError(f"grouping {self.members}: need equal groups that hold every head exactly once.")

    @classmethod
    def contiguous(cls, num_heads: int, num_groups: int) -> Grouping:
        """Groups of adjacent heads, as in the paper.

        Raises:
            UsageError: if `num_groups` does not divide `num_heads`.
        """
        if num_groups < 1 or num_heads % num_groups:
            raise UsageError(
                f"{num_heads} KV heads cannot be merged into {num_groups} groups. "
                f"Choose one of {', '.join(map(str, divisors(num_heads)))}."
            )
        size = num_heads // num_groups
        return cls(tuple(tuple(range(g * size, (g + 1) * size)) for g in range(num_groups)))

    @property
    def num_heads(self) -> int:
        """KV heads before the merge."""
        return self.num_groups * self.group_size

    @property
    def num_groups(self) -> int:
        """KV heads after the merge."""
        return len(self.members)

    @property
    def group_size(self) -> int:
        """Source KV heads in each group."""
        return len(self.members[0])

    @property
    def order(self) -> tuple[int, ...]:
        """Source heads in the order in which the grouping writes them."""
        return tuple(head for group in self.members for head in group)

    @property
    def is_contiguous(self) -> bool:
        """True if no head changes place."""
        return self.order == tuple(range(self.num_heads))


def split_heads(x: Tensor, num_heads: int, dim: int = 0) -> Tensor:
    """View axis `dim` of size `num_heads * D` as two axes `(num_heads, D)`.

    Raises:
        ValueError: if the axis does not split evenly.
    """
    size = x.shape[dim]
    if size % num_heads:
        raise ValueError(f"axis {dim} of size {size} does not split into {num_heads} heads")
    heads: Tensor = x.unflatten(dim, (num_heads, size // num_heads))
    return heads


def merge_heads(x: Tensor, dim: int = 0) -> Tensor:
    """Undo `split_heads`: flatten axes `dim` and `dim + 1` into one."""
    return x.flatten(dim, dim + 1)


def split_groups(x: Tensor, grouping: Grouping, dim: int = 0) -> Tensor:
    """Gather axis `dim` of size `K * D` into three axes `(G, R, D)`, in the grouping's order."""
    heads = split_heads(x, grouping.num_heads, dim)
    if not grouping.is_contiguous:
        heads = heads.index_select(dim, heads.new_tensor(grouping.order).long())
    grouped: Tensor = heads.unflatten(dim, (grouping.num_groups, grouping.group_size))
    return grouped
