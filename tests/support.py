"""What running a command gave, and what a folder held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finished:
    """A command that has run: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder with its hash and modification time: equal only if nothing was touched."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
