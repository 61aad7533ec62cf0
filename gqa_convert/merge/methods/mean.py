"""Mean pooling, the paper's conversion (Ainslie et al. 2023, section 2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gqa_convert.heads import merge_heads, split_groups
from gqa_convert.merge.registry import merge_method

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gqa_convert.heads import Grouping


@merge_method(
    name="mean",
    title="mean of the heads of a group",
    reference="Ainslie et al. 2023 (arXiv 2305.13245), section 2.1",
    needs_statistics=False,
    touches_query_output=False,
)
def pool(
    x: Tensor, grouping: Grouping, dim: int, *, generator: Generator | None = None, std: float | None = None
) -> Tensor:
    """Average the heads of each group: axis `dim` of size K*D becomes G*D.

    Computed in float32 (float64 for float64) and cast back. Heads that are equal bit for bit give that value bit for
    bit, whatever their number, because the mean is taken of the differences from the first head.

    Raises:
        ValueError: if the axis does not split into K heads.
    """
    import torch

    dim %= x.dim()
    heads = split_groups(x, grouping, dim)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = heads.select(dim + 1, 0).to(wide)
    # One head at a time: a whole tensor widened to float32 would be the peak of the conversion's memory.
    delta = torch.zeros_like(first)
    for r in range(1, grouping.group_size):
        delta += heads.select(dim + 1, r).to(wide) - first
    delta /= grouping.group_size
    # `-0.0 + 0.0` is `0.0`: where nothing differs, keep the first head's own bits.
    mean = torch.where(delta == 0, first, first + delta)
    return merge_heads(mean, dim).to(x.dtype)
