"""Pool one tensor of a checkpoint: read, checked, merged in float32, given back in its own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from gqa_convert.checkpoint.dtypes import not_finite
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError
from gqa_convert.merge.registry import get_method
from gqa_convert.merge.seeding import generator_for

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.conversion.operations import Pool


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


def pooled_tensor(checkpoint: Checkpoint, operation: Pool) -> Tensor:
    """Compute one merged tensor from the checkpoint's, in float32, in its own dtype.

    Raises:
        CheckpointError: if a source tensor holds a value that is not finite.
    """
    import torch

    parts = [checkpoint.tensor(key) for key in operation.sources]
    for key, part in zip(operation.sources, parts, strict=True):
        _check_finite(checkpoint, key, part)
    method = get_method(operation.method)
    assert method.pool is not None
    generator = generator_for(operation.seed, operation.key) if method.draws else None
    pool = partial(method.pool, generator=generator)
    if len(parts) > 1:
        return operation.rows.merge(torch.stack(parts), pool, operation.grouping).squeeze(0)
    return operation.rows.merge(parts[0], pool, operation.grouping)


def _check_finite(checkpoint: Checkpoint, key: str, x: Tensor) -> None:
    bad = not_finite(x)
    if bad:
        raise CheckpointError(
            f"{checkpoint.tensors[key].file}: {key} holds {bad} values that are not finite (NaN or infinity), so its "
            "heads cannot be averaged. Repair or re-download the checkpoint."
        )
