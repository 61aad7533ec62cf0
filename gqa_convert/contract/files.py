"""Checkpoint folders compared bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint folder by its raw key."""
    from safetensors.torch import load_file

    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors are of one dtype and shape and equal bit for bit."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
