"""How alike the heads of a group are, as they stand and after they were rotated onto each other.

Heads that compute the same thing in different bases look different until they are aligned; the gain from `before` to
`after` is what alignment has to offer over a plain mean (Jin et al. 2024, arXiv 2412.20677, section 3).
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gqa_convert.anatomy.anatomy import dissect
from gqa_convert.anatomy.blocks import layout_for, read_block, rotary_layouts
from gqa_convert.conversion.block_plan import plan_blocks
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.conversion.routes import routed
from gqa_convert.evaluate.results import LayerSimilarity
from gqa_convert.heads import Grouping
from gqa_convert.hf.loading import Source
from gqa_convert.merge.apply import group_maps
from gqa_convert.merge.moments import block_moments
from gqa_convert.merge.options import MergeOptions
from gqa_convert.merge.registry import get_method

if TYPE_CHECKING:
    from torch import Tensor


def head_similarity(folder: Path, groups: int, *, trust_remote_code: bool = False) -> list[LayerSimilarity]:
    """Compare the KV heads of every layer within groups of adjacent heads; reads one layer at a time.

    Args:
        folder: the model before conversion.
        groups: KV heads that it would be converted to; fewer than it has.
        trust_remote_code: allow the model's own Python code to run.

    Raises:
        UnsupportedModelError: if the architecture's heads cannot be aligned.
        UsageError: if `groups` does not divide the KV heads.
    """
    way = routed(Source.open(folder, trust_remote_code=trust_remote_code), groups=groups)
    checkpoint, anatomy = way.checkpoint, dissect(way.source, groups)
    blocks = plan_blocks(checkpoint, anatomy, Recipe(method="aligned"))
    if blocks is None or anatomy.difference is None:
        return []
    source = anatomy.difference.source
    layouts = rotary_layouts(source, blocks.freedom)

    def get(name: str) -> Tensor | None:
        return checkpoint.tensor(blocks.keys[name]) if name in blocks.keys else None

    layers = []
    method, options = get_method("aligned"), MergeOptions()
    for names in blocks.blocks:
        block = read_block(get, names, blocks.freedom, layout_for(names, source, layouts))
        moments = block_moments(block)
        grouping = Grouping.contiguous(block.num_kv_heads, groups)
        sums = torch.zeros(4, dtype=torch.float64)
        for members in grouping.members:
            maps = group_maps(method, moments, members, options)
            heads = list(members)
            keys, values = moments.block.w_k[heads], moments.block.w_v[heads]
            sums += torch.stack(
                [_cosine(keys), _cosine(maps.keys.encode @ keys), _cosine(values), _cosine(maps.values.encode @ values)]
            )
        means = (sums / grouping.num_groups).tolist()
        layers.append(
            LayerSimilarity(
                layer=names.module,
                keys_before=means[0],
                keys_after=means[1],
                values_before=means[2],
                values_after=means[3],
            )
        )
    return layers


def _cosine(heads_RDX: Tensor) -> Tensor:
    flat = torch.nn.functional.normalize(heads_RDX.flatten(1), dim=1)
    pairs = [flat[a] @ flat[b] for a, b in combinations(range(len(flat)), 2)]
    return torch.stack(pairs).mean() if pairs else flat.new_ones(())
