"""Merge the KV heads of one attention block by any method of the registry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from gqa_convert.heads import Grouping, merge_heads, split_heads
from gqa_convert.merge.assemble import assemble
from gqa_convert.merge.block import AttentionBlock
from gqa_convert.merge.maps import GroupMaps, HeadMaps, residual
from gqa_convert.merge.moments import BlockMoments, block_moments
from gqa_convert.merge.options import MergeOptions
from gqa_convert.merge.registry import plain_method
from gqa_convert.merge.seeding import generator_for

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.registry import MergeMethod, PoolFunction
    from gqa_convert.merge.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge of one block cost, by its own measure."""

    method: str
    grouping: Grouping
    query_order: tuple[int, ...]
    """Source query heads in their new order: other per-head parameters must follow."""
    key_residual: float | None = None
    """Variance of the scores' error over that of the scores; None where no moments were computed."""
    value_residual: float | None = None
    """Mean square error of the heads' contributions to the output over their mean square."""
    folded_pairs: int = 0
    """Rotary pairs taken as not turning."""


@dataclass(frozen=True, kw_only=True)
class MergedBlock:
    """A block with G KV heads in the place of K, and the report of the merge."""

    block: AttentionBlock
    report: MergeReport


def method_options(method: MergeMethod, options: MergeOptions | None) -> MergeOptions:
    """The options as the method reads them: no fold for a method that cannot fold."""
    options = options or MergeOptions()
    return options if method.folds else replace(options, max_context=None)


def group_maps(
    method: MergeMethod, moments: BlockMoments, members: tuple[int, ...], options: MergeOptions
) -> GroupMaps:
    """Return the maps by which a method merges one group; those of a pool are found by pooling an identity.

    Raises:
        ValueError: if the method draws its heads at random, which is no map.
    """
    if method.maps is not None:
        return method.maps(moments, members, options)
    if method.pool is None or method.draws:
        raise ValueError(f"method {method.name!r} draws its heads, which is no linear map of the old ones")
    return GroupMaps(
        keys=_pool_maps(method.pool, len(members), moments.block.w_k),
        values=_pool_maps(method.pool, len(members), moments.block.w_v),
    )


def merge_block(
    method: MergeMethod,
    block: AttentionBlock,
    grouping: Grouping,
    statistics: Statistics | None = None,
    options: MergeOptions | None = None,
    *,
    moments: BlockMoments | None = None,
) -> MergedBlock:
    """Merge the K KV heads of `block` into the grouping's G, with the block's heads reordered to suit.

    Computed in float64 (a pool: as its `pool` says) and returned in the block's dtype. Groups of one head are copied
    bit for bit. Pass `moments` to reuse those of a search; they must be of this block under the same statistics and
    `method_options`. Without statistics the layer's input is taken as white noise.

    Raises:
        ValueError: if the grouping is not of K heads, or the statistics are of another width.
    """
    if grouping.num_heads != block.num_kv_heads:
        raise ValueError(f"grouping of {grouping.num_heads} heads for a block of {block.num_kv_heads} KV heads")
    options = method_options(method, options)
    report = MergeReport(method=method.name, grouping=grouping, query_order=block.query_order(grouping))
    if grouping.group_size == 1:
        return MergedBlock(block=block.permuted(grouping), report=replace(report, key_residual=0.0, value_residual=0.0))
    if method.pool is not None:
        return MergedBlock(block=_pooled(method, block, grouping, options), report=report)
    moments = moments or block_moments(block, statistics, options)
    maps = [group_maps(method, moments, members, options) for members in grouping.members]
    key_loss, value_loss = 0.0, 0.0
    for members, group in zip(grouping.members, maps, strict=True):
        keys, values = residual(moments, members, group)
        key_loss, value_loss = key_loss + keys, value_loss + values
    key_total, value_total = moments.total
    return MergedBlock(
        block=assemble(moments, grouping, maps).to(block.w_k.dtype),
        report=replace(
            report,
            key_residual=key_loss / key_total if key_total else 0.0,
            value_residual=value_loss / value_total if value_total else 0.0,
            folded_pairs=moments.keys.folded // 2,
        ),
    )


def _pool_maps(pool: PoolFunction, size: int, weight_KDY: Tensor) -> HeadMaps:
    dim = weight_KDY.shape[1]
    eye = torch.eye(size * dim, dtype=torch.float64, device=weight_KDY.device)
    encode = pool(eye, Grouping.contiguous(size, 1), 0)
    return HeadMaps(encode=split_heads(encode, size, 1).transpose(0, 1), decode=eye[:dim, :dim].expand(size, dim, dim))


def _pooled(method: MergeMethod, block: AttentionBlock, grouping: Grouping, options: MergeOptions) -> AttentionBlock:
    def merge(name: str, tensor: Tensor) -> Tensor:
        by = plain_method() if method.draws and name.startswith("b_") else method
        assert by.pool is not None
        generator = generator_for(options.seed, f"{options.key}.{name}")
        return split_heads(by.pool(merge_heads(tensor), grouping, 0, generator=generator), grouping.num_groups)

    return replace(
        block.permuted(grouping),
        w_k=merge("w_k", block.w_k),
        w_v=merge("w_v", block.w_v),
        b_k=None if block.b_k is None else merge("b_k", block.b_k),
        b_v=None if block.b_v is None else merge("b_v", block.b_v),
    )
