"""Heads aligned before they are averaged (Jin et al. 2024, arXiv 2412.20677).

Values: generalised orthogonal Procrustes within the group, undone on o_proj. Keys: one unit phase a rotary pair, undone
on q; dims that do not turn are aligned like values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gqa_convert.merge.registry import merge_method

if TYPE_CHECKING:
    from gqa_convert.merge.maps import GroupMaps
    from gqa_convert.merge.moments import BlockMoments
    from gqa_convert.merge.options import MergeOptions


@merge_method(
    name="aligned",
    title="mean of the heads after rotating them onto each other",
    reference="Jin et al. 2024 (arXiv 2412.20677), section 3",
    needs_statistics=True,
    touches_query_output=True,
)
def maps(moments: BlockMoments, members: tuple[int, ...], options: MergeOptions) -> GroupMaps:
    """Return the maps of one group; see the module's docstring."""
    from gqa_convert.merge.maps import GroupMaps, key_maps, mean_maps
    from gqa_convert.merge.procrustes import align_pairs, align_vectors
    from gqa_convert.merge.restricted import restricted_key_maps

    block, keys = moments.block, moments.keys
    if block.freedom == "full":
        encode, decode = align_pairs(keys, members, renorm=options.renorm)
        static = align_vectors(keys.static, members, renorm=options.renorm)
        key = key_maps(keys, encode, decode, static.encode, static.decode)
    else:
        key = restricted_key_maps(moments, members)
    if block.value_gauge == "full":
        value = align_vectors(moments.values, members, renorm=options.renorm)
    else:
        value = mean_maps(len(members), block.w_v.shape[1], like=moments.values.gram)
    return GroupMaps(keys=key, values=value)
