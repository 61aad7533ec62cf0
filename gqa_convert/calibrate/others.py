"""What else in a layer depends on its KV heads: norms over all heads, per-head norms, depthwise convolutions.

The merges leave them to the mean of each group. Where heads change places, what is given here has been moved already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gqa_convert.merge.registry import get_method

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.anatomy.shapes import ShapeDifference


def other_state(
    difference: ShapeDifference, get: Callable[[str], Tensor | None], path: str, solved: Iterable[str]
) -> dict[str, Tensor]:
    """Return the merged tensors of one layer that belong to no block, by parameter name, in float32.

    Args:
        difference: what depends on KV heads.
        get: the source's parameters by name.
        path: the layer.
        solved: names that are already dealt with.
    """
    import torch

    pool = get_method("mean").pool
    assert pool is not None
    done, state = set(solved), {}
    for name, rows in difference.rows.items():
        source = get(name) if name.startswith(f"{path}.") and name not in done else None
        if source is not None:
            state[name] = rows.merge(source.detach().float(), pool)
    for name, stack in difference.stacks.items():
        if name.startswith(f"{path}.") and name in difference.target_shapes:
            index, size = difference.stack_of(name)
            members = [get(other) for other in stack[index * size : (index + 1) * size]]
            state[name] = torch.stack([m.detach().float() for m in members if m is not None]).mean(0)
    return state
