"""What an attention block is: where its projections are, what else belongs to its heads, and what may be changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gqa_convert.anatomy.head_axis import Rows

if TYPE_CHECKING:
    from torch import Tensor

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Get = Callable[[str], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class HeadExtra:
    """One per-head parameter of every attention module that has it."""

    name: str
    """Path within the attention module; for a list of one module a head, `{}` in the place of the head's number."""
    heads: Literal["query", "kv"]
    """Whose heads lie in it."""
    dim: int = 0
    """The axis in which they lie; of no meaning for a list."""

    def names(self, block: BlockNames) -> tuple[str, ...]:
        """Parameter names in one block's module: one, or one a head."""
        count = block.query_heads if self.heads == "query" else block.kv_heads
        path = f"{block.module}.{self.name}"
        return tuple(path.format(head) for head in range(count)) if "{}" in self.name else (path,)


@dataclass(frozen=True, kw_only=True)
class BlockNames:
    """Where one attention layer's projections are, by module path.

    `layer` is the decoder layer that holds the attention module `module`. For a fused projection `q`, `k` and `v` are
    the same module and `fused` says how heads lie in its rows.
    """

    module: str
    layer: str
    q: str
    k: str
    v: str
    o: str
    query_heads: int
    kv_heads: int
    groups: int
    fused: Rows | None = None

    @property
    def cross(self) -> bool:
        """True for cross-attention, whose keys and values read the encoder's output."""
        leaf = self.module.rsplit(".", 1)[-1]
        return "cross" in leaf or leaf.startswith("encoder") or leaf == "EncDecAttention"

    @property
    def transposed(self) -> bool:
        """True if the weights are (in, out), as GPT-2's are."""
        return self.fused is not None and self.fused.dim == 1


@dataclass(frozen=True, kw_only=True)
class Freedom:
    """Which changes to q, k, v and o leave an architecture's function as it is; proven, not assumed."""

    rotary_kind: Literal["none", "half", "interleaved"]
    key_gauge: Literal["full", "signs", "none"]
    value_gauge: Literal["full", "none"]
    permutable: bool
    """Whether heads may change places in every block."""
    cross_permutable: bool = False
    """Whether they may in cross-attention, where those of other blocks are tied to theirs (T5)."""
    shift_invariant: bool = True
    extras: tuple[HeadExtra, ...] = ()
    """Other per-head parameters, which change places with their heads."""

    def moves(self, names: BlockNames) -> bool:
        """Whether the heads of this block may change places."""
        return self.permutable or (self.cross_permutable and names.cross)
