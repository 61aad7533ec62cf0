"""Principal components: the shared head that loses least, in closed form.

Values: the best rank-D approximation of the group's stacked values in the metric of o_proj (Yu et al. 2024, arXiv
2406.07056, with the weighting of A3, arXiv 2505.12942). Keys without rotary position: group KQ-SVD (arXiv 2512.05916).
Keys that turn: one complex principal component a rotary pair, own derivation; a complex number for each head and pair
is all that commutes with the rotations, and q takes its conjugate. Slow pairs may be folded: see `MergeOptions`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gqa_convert.merge.registry import merge_method

if TYPE_CHECKING:
    from gqa_convert.merge.maps import GroupMaps
    from gqa_convert.merge.moments import BlockMoments
    from gqa_convert.merge.options import MergeOptions


def cost(moments: BlockMoments, members: tuple[int, ...]) -> tuple[float, float]:
    """Return the (key, value) residual of sharing `members`: the sums of the discarded eigenvalues."""
    from gqa_convert.merge.components import complex_cost, real_cost
    from gqa_convert.merge.maps import residual
    from gqa_convert.merge.options import MergeOptions

    if moments.block.freedom != "full" or moments.block.value_gauge != "full":
        return residual(moments, members, maps(moments, members, MergeOptions()))
    keys = complex_cost(moments.keys, members) + real_cost(moments.keys.static, members)
    return keys, real_cost(moments.values, members)


@merge_method(
    name="pca",
    title="shared head of least error, keys folded into q and values into o",
    reference="values: Yu et al. 2024 (arXiv 2406.07056); keys: KQ-SVD (arXiv 2512.05916) and own derivation",
    needs_statistics=True,
    touches_query_output=True,
    folds=True,
    cost=cost,
)
def maps(moments: BlockMoments, members: tuple[int, ...], options: MergeOptions) -> GroupMaps:
    """Return the maps of one group; see the module's docstring."""
    from gqa_convert.merge.components import complex_component, real_components
    from gqa_convert.merge.maps import GroupMaps, key_maps, mean_maps
    from gqa_convert.merge.restricted import restricted_key_maps

    block, keys = moments.block, moments.keys
    if block.freedom == "full":
        encode, decode = complex_component(keys, members)
        static = real_components(keys.static, members, ordered=keys.folded > 0)
        key = key_maps(keys, encode, decode, static.encode, static.decode)
    else:
        key = restricted_key_maps(moments, members)
    if block.value_gauge == "full":
        value = real_components(moments.values, members)
    else:
        value = mean_maps(len(members), block.w_v.shape[1], like=moments.values.gram)
    return GroupMaps(keys=key, values=value, rescale=True)
