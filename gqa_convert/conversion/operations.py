"""What a conversion writes: one operation for every tensor, decided before a byte of it is touched.

`ConvertPlan.operations` is the one list of them. Executing, verifying, the plan's table, its sizes and the record in
the output all read it, so that none of them can be of another mind. Every operation on heads has a `Grouping` of its
own: layers may have different numbers of KV heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gqa_convert.anatomy.anatomy import Anatomy
from gqa_convert.anatomy.head_axis import Rows
from gqa_convert.anatomy.tensor_merges import Merge
from gqa_convert.checkpoint.dtypes import BITS
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.safetensors_file import TensorInfo
from gqa_convert.conversion.block_plan import BlockPlan
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.heads import Grouping
from gqa_convert.merge.registry import MergeMethod, plain_method
from gqa_convert.modeling.transpile.view import computed_from


@dataclass(frozen=True, kw_only=True)
class Written:
    """What all operations say of the tensor that they write.

    Attributes:
        key: its raw key in the converted checkpoint.
        shard: the weight file it goes into.
        sources: raw keys of what it is made from, in the plan's checkpoint (for `Rewrite`: in the one that it views).
        dtype: safetensors spelling.
        source_shape: sizes of the first source's axes, as the plan's checkpoint gives it.
        shape: sizes of the written tensor's axes.
        nbytes: bytes that it takes.
    """

    key: str
    shard: str
    sources: tuple[str, ...]
    dtype: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements that are written."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Copy(Written):
    """A tensor that keeps its bytes, under its old key or, in a view of another family's terms, under a new one."""


@dataclass(frozen=True, kw_only=True)
class Rewrite(Written):
    """A tensor that is computed from stored ones so that another family computes the same; no head is merged in it."""


@dataclass(frozen=True, kw_only=True)
class _OfHeads(Written):
    """A tensor that depends on KV heads.

    `cache_bytes_before` and `cache_bytes_after` are what it adds to the KV cache per token, 0 but for k and v.
    """

    cache_bytes_before: int = 0
    cache_bytes_after: int = 0


@dataclass(frozen=True, kw_only=True)
class Pool(_OfHeads):
    """A tensor whose KV heads are merged by itself, whatever else is in its layer.

    Attributes:
        rows: how heads lie along its axis, before and after.
        grouping: which of them share a head afterwards.
        method: the merge method that pools it; not always the recipe's (see `pool_of`).
        seed: of a method that draws.
    """

    rows: Rows
    grouping: Grouping
    method: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Solve(_OfHeads):
    """A tensor that comes out of solving its whole attention block.

    Attributes:
        parameter: its name in the target model, by which solving knows it.
        block: path of the attention module.
        kv_heads: KV heads of the block before.
        groups: KV heads of the block afterwards.
        grouping: which heads share one; None where solving has yet to search for it.
    """

    parameter: str
    block: str
    kv_heads: int
    groups: int
    grouping: Grouping | None


Operation = Copy | Rewrite | Pool | Solve


def operations_of(
    checkpoint: Checkpoint, anatomy: Anatomy, recipe: Recipe, blocks: BlockPlan | None
) -> tuple[Operation, ...]:
    """Return the operations of a conversion, one for every tensor that is written, in the order of writing.

    Args:
        checkpoint: what is converted: as stored, or a view of it in another family's terms.
        anatomy: what in it depends on KV heads, and what the conversion drops.
        recipe: how heads are merged.
        blocks: the blocks that are solved whole; None if tensors are pooled one by one.
    """
    merges = {merge.key: merge for merge in anatomy.merges}
    solved = dict(_solved(blocks)) if blocks is not None else {}
    dropped = set(anatomy.dropped)
    operations: list[Operation] = []
    for shard in checkpoint.shards:
        for key, info in shard.tensors.items():
            if key in dropped:
                continue
            merge = merges.get(key)
            if key in solved:
                operations.append(_solve(info, shard.name, merge, **solved[key]))
            elif merge is not None:
                operations.append(pool_of(info, merge, recipe, shard=shard.name))
            else:
                operations.append(_unmerged(info, shard.name))
    return tuple(operations)


def pool_of(info: TensorInfo, merge: Merge, recipe: Recipe, *, shard: str = "", groups: Grouping | None = None) -> Pool:
    """Return the pooling of one tensor.

    A method of whole blocks leaves norms and the like to the mean, and so does one that draws: a norm or bias redrawn
    about zero is damage that no paper means by "random".

    Args:
        info: the tensor.
        merge: how heads lie in it.
        recipe: by which its method is chosen.
        shard: the weight file it goes into.
        groups: which heads share one; adjacent ones by default.
    """
    return Pool(
        **_heads(info, shard, merge),
        rows=merge.rows,
        grouping=groups or merge.rows.grouping(),
        method=_pooling(recipe.merge_method, merge).name,
        seed=recipe.seed,
    )


def _pooling(method: MergeMethod, merge: Merge) -> MergeMethod:
    if method.pool is None or (method.draws and not merge.is_projection):
        return plain_method()
    return method


def _unmerged(info: TensorInfo, shard: str) -> Copy | Rewrite:
    sources = computed_from(info)
    cls: type[Copy | Rewrite] = Copy if sources is None else Rewrite
    return cls(
        key=info.key,
        shard=shard,
        sources=(info.key,) if sources is None else sources,
        dtype=info.dtype,
        source_shape=info.shape,
        shape=info.shape,
        nbytes=info.nbytes,
    )


def _solve(info: TensorInfo, shard: str, merge: Merge | None, **block: Any) -> Solve:
    if merge is None:  # of queries: its values change, its shape does not
        return Solve(**_common(info, shard, info.shape), sources=(info.key,), **block)
    return Solve(**_heads(info, shard, merge), **block)


def _heads(info: TensorInfo, shard: str, merge: Merge) -> dict[str, Any]:
    width = BITS[info.dtype] // 8
    return {
        **_common(info, shard, merge.target_shape),
        "sources": merge.sources,
        "cache_bytes_before": merge.cached * width,
        "cache_bytes_after": merge.cached_target * width,
    }


def _common(info: TensorInfo, shard: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "key": info.key,
        "shard": shard,
        "dtype": info.dtype,
        "source_shape": info.shape,
        "shape": shape,
        "nbytes": math.prod(shape) * BITS[info.dtype] // 8,
    }


def _solved(blocks: BlockPlan) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What `Solve` says of its block, by raw key."""
    for names in blocks.blocks:
        searched = blocks.recipe.grouping == "search" and blocks.freedom.moves(names)
        contiguous = None if searched else Grouping.contiguous(names.kv_heads, names.groups)
        block = {"block": names.module, "kv_heads": names.kv_heads, "groups": names.groups, "grouping": contiguous}
        for parameter in blocks.parameters(names):
            yield blocks.keys[parameter], {"parameter": parameter, **block}


def working_bytes(checkpoint: Checkpoint, operation: Operation) -> int:
    """Peak memory of writing one tensor.

    Of a pooling its sources, the result, and the float32 halves of the running mean; of a solved tensor the float32
    result and its copy in the written dtype. A copy is done by the kernel; what a view computes, it knows itself.
    """
    if isinstance(operation, Solve):
        return 4 * operation.numel + operation.nbytes
    if not isinstance(operation, Pool):
        return 0
    read = sum(checkpoint.tensors[key].nbytes for key in operation.sources)
    return read + checkpoint.tensors[operation.key].nbytes + 12 * operation.numel
