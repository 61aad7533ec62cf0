"""Random numbers that depend on what they are for, not on the order in which they are drawn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator


def generator_for(seed: int, key: str) -> Generator:
    """Return a CPU generator whose stream is a function of `seed` and of the tensor's raw checkpoint `key` alone.

    Tensors may then be converted in any order, by any number of workers, or by a resumed run, with equal results.
    """
    import torch

    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
