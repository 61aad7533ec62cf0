"""Fresh random heads (the paper's control)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gqa_convert.heads import merge_heads, split_groups
from gqa_convert.merge.methods.mean import pool as mean_pool
from gqa_convert.merge.registry import merge_method

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gqa_convert.heads import Grouping


@merge_method(
    name="random",
    title="fresh random heads, as wide as the old ones",
    reference="Ainslie et al. 2023 (arXiv 2305.13245), section 3.3 and figure 4",
    needs_statistics=False,
    touches_query_output=False,
    draws=True,
)
def pool(
    x: Tensor, grouping: Grouping, dim: int, *, generator: Generator | None = None, std: float | None = None
) -> Tensor:
    """Draw normal heads of mean 0: axis `dim` of size K*D becomes G*D.

    `std` is by default the root mean square of the elements about their mean in `x`. Drawn in float32 on the CPU from
    `generator` (see `generator_for`) and cast, so that a seed gives the same heads on every device.

    A vector (a bias, or the weight of a norm over the heads) is pooled by its mean instead: a norm redrawn about 0
    would switch half of its channels' signs. A norm stored as `(heads, head_dim)` looks like a matrix; pool that by
    `mean` yourself. With one head a group there is nothing to merge, and the heads are copied.

    Raises:
        ValueError: if the axis does not split into K heads.
    """
    import torch

    dim %= x.dim()
    if x.dim() == 1:
        return mean_pool(x, grouping, dim)
    first = merge_heads(split_groups(x, grouping, dim).select(dim + 1, 0), dim)
    if grouping.group_size == 1:
        return first.clone()
    scale = x.to(torch.float32).std(correction=0).item() if std is None else std
    drawn = torch.randn(first.shape, generator=generator, dtype=torch.float32)
    return (drawn * scale).to(device=x.device, dtype=x.dtype)
