"""Merge one tensor of a checkpoint: read, checked, pooled in float32, given back in its own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.tensor_merges import Merge
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError
from gqa_convert.merge.registry import MergeMethod, get_method
from gqa_convert.merge.seeding import generator_for

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one processor, in this thread and in those it starts.

    Means are bound by memory, and torch's threads wait for each other on a busy machine.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def merged_tensor(checkpoint: Checkpoint, merge: Merge, method: MergeMethod, seed: int) -> Tensor:
    """Compute one merged tensor from the source's, in float32, in the source's dtype.

    Raises:
        CheckpointError: if a source tensor holds a value that is not finite.
    """
    import torch

    parts = [checkpoint.tensor(key) for key in merge.sources]
    for key, part in zip(merge.sources, parts, strict=True):
        _check_finite(checkpoint, key, part)
    if method.name == "random" and not merge.is_projection:
        method = get_method("mean")  # a norm or bias redrawn about zero is damage that no paper means by "random"
    generator = generator_for(seed, merge.key) if method.name == "random" else None

    pooled = method.pool or get_method("mean").pool  # a method of whole blocks leaves norms and the like to the mean

    def pool(x: Tensor, grouping: Any, dim: int) -> Tensor:
        assert pooled is not None
        return pooled(x, grouping, dim, generator=generator)

    if len(parts) > 1:
        return merge.rows.merge(torch.stack(parts), pool).squeeze(0)
    return merge.rows.merge(parts[0], pool)


def _check_finite(checkpoint: Checkpoint, key: str, x: Tensor) -> None:
    import torch

    # A sum is not finite if any element is not; it may also overflow, so only then is every element looked at. A sum
    # in x's own dtype is the fastest: torch accumulates half precision in float32 all the same.
    if torch.isfinite(x.sum()):
        return
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise CheckpointError(
            f"{checkpoint.tensors[key].file}: {key} holds {bad} values that are not finite (NaN or infinity), so its "
            "heads cannot be averaged. Repair or re-download the checkpoint."
        )
