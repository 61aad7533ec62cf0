"""Write the shared heads of a block from the maps of its groups, and q and o_proj as they must then be.

Shape suffixes: H query heads, K KV heads, G groups, R heads in a gRoup, D head_dim (of v too), Y input width, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gqa_convert.heads import Grouping
    from gqa_convert.merge.block import AttentionBlock
    from gqa_convert.merge.maps import GroupMaps, HeadMaps
    from gqa_convert.merge.moments import BlockMoments


@dataclass(frozen=True)
class _Shared:
    """Maps of all groups' keys or values, and the tensors they give."""

    encode: Tensor
    """(G, R, D, D)"""
    decode: Tensor
    """(G, R, D, D)"""
    weight: Tensor
    """(G, D, Y)"""
    bias: Tensor | None
    """(G, D)"""

    def scaled(self, scale_GD: Tensor) -> _Shared:
        """Scale the shared dims, and what reads them against it."""
        return _Shared(
            encode=self.encode * scale_GD[:, None, :, None],
            decode=self.decode / scale_GD[:, None, None],
            weight=self.weight * scale_GD[..., None],
            bias=None if self.bias is None else self.bias * scale_GD,
        )


def assemble(moments: BlockMoments, grouping: Grouping, maps: Sequence[GroupMaps]) -> AttentionBlock:
    """Return the merged block, in float64, heads in the grouping's order."""
    block = moments.block.permuted(grouping)
    size = (grouping.num_groups, grouping.group_size)
    w_k, w_v = block.w_k.unflatten(0, size), block.w_v.unflatten(0, size)
    # Shared heads: k_g = sum_r E_r k_r, v_g = sum_r E_r v_r, where E_r (encode) is the map of the group's r-th head.
    keys = _share([m.keys for m in maps], w_k, block.b_k)
    values = _share([m.values for m in maps], w_v, block.b_v)
    # Where maps lose size, shared heads get the members' mean square back (and their readers the inverse).
    if maps[0].rescale and block.freedom == "full":
        keys = keys.scaled(_key_scale(moments, w_k, keys.weight))
    if maps[0].rescale and block.value_gauge == "full":
        scale_G = _ratio(w_v.square().sum((1, 2, 3)) / size[1], values.weight.square().sum((1, 2)))
        values = values.scaled(scale_G[:, None].expand(-1, block.w_v.shape[1]))
    r = block.queries_per_kv
    # k_r is approximated by D_r k_g (decode), v_r by D_r v_g: q becomes D_r^T q, and W_O becomes W_O D_r.
    key_decode_HDD, value_decode_HDD = (m.decode.flatten(0, 1).repeat_interleave(r, dim=0) for m in (keys, values))
    b_o = block.b_o
    if b_o is not None and moments.values_centred:
        # The constant part that sharing loses, mean_r - D_r (sum_s E_s mean_s), passes through attention whole (rows
        # sum to 1) and goes into b_O.
        mean_GRD = moments.values.mean[list(grouping.order)].unflatten(0, size)
        shared_GD = torch.einsum("grde,gre->gd", values.encode, mean_GRD)
        lost_GRD = mean_GRD - torch.einsum("grde,ge->grd", values.decode, shared_GD)
        b_o = b_o + torch.einsum("ohd,hd->o", block.w_o, lost_GRD.flatten(0, 1).repeat_interleave(r, dim=0))
    return replace(
        block,
        w_k=keys.weight,
        w_v=values.weight,
        w_q=key_decode_HDD.transpose(1, 2) @ block.w_q,
        w_o=torch.einsum("ohd,hde->ohe", block.w_o, value_decode_HDD),
        b_q=None if block.b_q is None else torch.einsum("hde,hd->he", key_decode_HDD, block.b_q),
        b_k=keys.bias,
        b_v=values.bias,
        b_o=b_o,
    )


def _share(maps: Sequence[HeadMaps], weight_GRDY: Tensor, bias_KD: Tensor | None) -> _Shared:
    encode = torch.stack([m.encode for m in maps])
    bias = None
    if bias_KD is not None:
        bias = torch.einsum("grde,gre->gd", encode, bias_KD.unflatten(0, weight_GRDY.shape[:2]))
    return _Shared(
        encode=encode,
        decode=torch.stack([m.decode for m in maps]),
        weight=torch.einsum("grde,grey->gdy", encode, weight_GRDY),
        bias=bias,
    )


def _key_scale(moments: BlockMoments, members_GRDY: Tensor, shared_GDY: Tensor) -> Tensor:
    """(G, D): one factor a turning pair and one for all static dims, that gives shared keys their members' size."""
    wanted, seen = members_GRDY.square().sum(-1).mean(1), shared_GDY.square().sum(-1)
    scale = torch.ones_like(seen)
    for dims in ([list(pair) for pair in moments.keys.pairs], [list(moments.keys.static_dims)]):
        if dims and dims[0]:
            index = torch.tensor(dims, device=scale.device)
            scale[:, index] = _ratio(wanted[:, index].sum(-1), seen[:, index].sum(-1))[..., None]
    return scale


def _ratio(wanted: Tensor, seen: Tensor) -> Tensor:
    both = (seen > 0) & (wanted > 0)
    return torch.where(both, wanted / torch.where(seen > 0, seen, torch.ones_like(seen)), 1.0).sqrt()
