"""One attention layer as plain tensors.

Shape suffixes: H query heads, K KV heads (query head h reads KV head h // (H / K)), D head_dim of q and k, V head_dim
of v, X input width of q (and of k and v in self-attention), Y input width of k and v, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gqa_convert.heads import Grouping

RotaryKind = Literal["none", "half", "interleaved"]
KeyGauge = Literal["full", "signs", "none"]
ValueGauge = Literal["full", "none"]
_TENSORS = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")


@dataclass(frozen=True, kw_only=True)
class RotaryLayout:
    """Which dims of a head turn with the position, and how fast.

    Pair i is dims (i, i + rotary_dim / 2) for `half` (rotate_half, most of transformers) and (2i, 2i + 1) for
    `interleaved` (GPT-J, Cohere). Dims from `rotary_dim` on pass through unturned.

    Raises:
        ValueError: if `rotary_dim` is odd or there is not one frequency a pair.
    """

    kind: RotaryKind = "none"
    rotary_dim: int = 0
    inv_freq: tuple[float, ...] | Tensor = ()
    """Radians a token, one for each of the rotary_dim / 2 pairs; kept as a tuple."""

    def __post_init__(self) -> None:
        frequencies = tuple(float(f) for f in self.inv_freq)
        object.__setattr__(self, "inv_freq", frequencies)
        if (self.kind == "none") != (self.rotary_dim == 0) or self.rotary_dim != 2 * len(frequencies):
            raise ValueError(
                f"rotary layout {self.kind!r}: rotary_dim={self.rotary_dim} with {len(frequencies)} frequencies"
            )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The two dims of each pair."""
        half = self.rotary_dim // 2
        if self.kind == "half":
            return tuple((i, i + half) for i in range(half))
        return tuple((2 * i, 2 * i + 1) for i in range(half))

    @property
    def frequencies(self) -> tuple[float, ...]:
        """`inv_freq` as the tuple it always is."""
        return tuple(self.inv_freq)


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Weights of one attention layer (float32 or float64), biases where the layer has them.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    w_q: Tensor
    """(H, D, X)"""
    w_k: Tensor
    """(K, D, Y)"""
    w_v: Tensor
    """(K, V, Y)"""
    w_o: Tensor
    """(O, H, V)"""
    b_q: Tensor | None = None
    """(H, D)"""
    b_k: Tensor | None = None
    """(K, D)"""
    b_v: Tensor | None = None
    """(K, V)"""
    b_o: Tensor | None = None
    """(O,)"""
    rotary: RotaryLayout = field(default_factory=RotaryLayout)
    qk_norm: bool = False
    """A root-mean-square norm stands between the projections of q and k and the rotation."""
    key_gauge: KeyGauge | None = None
    """What may be done to k and undone on q; by default `signs` under `qk_norm`, else `full`."""
    value_gauge: ValueGauge = "full"
    """`none` where something stands between v and o_proj: a norm on v, a gate on the heads' outputs."""
    shift_invariant: bool = True
    """Adding one number to all scores of a query changes nothing; not so with attention sinks."""

    def __post_init__(self) -> None:
        h, d, _ = self.w_q.shape
        k, dv, y = self.w_v.shape
        o = self.w_o.shape[0]
        want = {"w_k": (k, d, y), "w_o": (o, h, dv), "b_q": (h, d), "b_k": (k, d), "b_v": (k, dv), "b_o": (o,)}
        for name, shape in want.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        if h % k:
            raise ValueError(f"{h} query heads cannot be shared by {k} KV heads")
        if self.rotary.rotary_dim > d:
            raise ValueError(f"rotary_dim={self.rotary.rotary_dim} exceeds head_dim={d}")

    @property
    def num_query_heads(self) -> int:
        """H."""
        return int(self.w_q.shape[0])

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return int(self.w_k.shape[0])

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.w_q.shape[1])

    @property
    def queries_per_kv(self) -> int:
        """Query heads that read one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def freedom(self) -> KeyGauge:
        """What may be done to k and undone on q without changing a score."""
        return self.key_gauge or ("signs" if self.qk_norm else "full")

    def to(self, dtype: torch.dtype) -> AttentionBlock:
        """The same block with every tensor in `dtype`."""
        return self._map(lambda _, tensor: tensor.to(dtype))

    def query_order(self, grouping: Grouping) -> tuple[int, ...]:
        """Source query heads in the order in which a grouping of the KV heads writes them.

        Every other per-head parameter (position biases, sinks, gates, full-width norm weights) moves the same way.
        """
        r = self.queries_per_kv
        return tuple(h * r + i for h in grouping.order for i in range(r))

    def permuted(self, grouping: Grouping) -> AttentionBlock:
        """Reorder the KV heads, and with them their query heads and o_proj columns, so that groups are contiguous.

        The block's function is unchanged, exactly but for the order of summation in o_proj.
        """
        if grouping.is_contiguous:
            return self
        kv = torch.tensor(grouping.order, device=self.w_k.device)
        query = torch.tensor(self.query_order(grouping), device=self.w_k.device)

        def move(name: str, tensor: Tensor) -> Tensor:
            if name == "b_o":
                return tensor
            return tensor.index_select(1 if name == "w_o" else 0, kv if name[2] in "kv" else query)

        return self._map(move)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> AttentionBlock:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        changed: dict[str, Any] = {name: function(name, x) for name, x in tensors.items() if x is not None}
        return replace(self, **changed)
