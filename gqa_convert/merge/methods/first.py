"""The first head of each group (the paper's second choice)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gqa_convert.heads import merge_heads, split_groups
from gqa_convert.merge.registry import merge_method

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gqa_convert.heads import Grouping


@merge_method(
    name="first",
    title="first head of each group, copied",
    reference="Ainslie et al. 2023 (arXiv 2305.13245), section 3.3 and figure 4",
    needs_statistics=False,
    touches_query_output=False,
)
def pool(
    x: Tensor, grouping: Grouping, dim: int, *, generator: Generator | None = None, std: float | None = None
) -> Tensor:
    """Copy the first head of each group bit for bit: axis `dim` of size K*D becomes G*D.

    Raises:
        ValueError: if the axis does not split into K heads.
    """
    dim %= x.dim()
    return merge_heads(split_groups(x, grouping, dim).select(dim + 1, 0), dim).clone()
