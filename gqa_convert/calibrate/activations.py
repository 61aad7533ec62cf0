"""Where activations are: moved between devices, and kept in memory or in mapped files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SMALL = 1 << 16  # bytes that are not worth a file


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in nested tuples, lists and dicts; what is there already stays the same object."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if device.type == "cpu" and not _elsewhere(value):
        return value
    if isinstance(value, tuple):
        moved = [to_device(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    if type(value) is dict:
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def _elsewhere(value: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return value.device.type != "cpu"
    items = value.values() if type(value) is dict else value if isinstance(value, (tuple, list)) else ()
    return any(_elsewhere(item) for item in items)


class Spill:
    """Keeps activations in memory up to a limit, and above it in mapped files that vanish with their tensors."""

    def __init__(self, folder: Path | None, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._held = 0

    def reset(self) -> None:
        """Start counting anew, when what was kept before has been given up."""
        self._held = 0

    def keep(self, value: Any) -> Any:
        """Return `value` with its larger tensors moved to files if the limit has been reached."""
        import torch

        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(self.keep(item) for item in value)
        if type(value) is dict:
            return {key: self.keep(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        size = value.numel() * value.element_size()
        self._held += size
        if self._held <= self.limit_bytes or size < _SMALL:
            return value
        handle, name = tempfile.mkstemp(prefix="activations-", dir=self.folder)
        os.close(handle)
        mapped = torch.from_file(name, shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        os.unlink(name)  # the mapping outlives the name
        return mapped.copy_(value)
