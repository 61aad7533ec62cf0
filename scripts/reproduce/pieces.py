"""Pieces of work that are done once: each in a folder named by the hash of its settings, its result in one file.

A piece that was interrupted finds its folder again (an uptraining goes on from its checkpoint); one that is finished is
read back. Settings that change, or other versions, give another hash and so another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULT = "result.json"
IN_ONE_GO = "in_one_go.json"
"""Beside the pieces: what all of them took, where one command made them in an empty folder."""
PACKAGES = ("gqa-convert", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Piece:
    """A finished piece: its folder, its key (for the settings of pieces that build on it), and its result."""

    folder: Path
    key: str
    result: dict[str, Any]


class Unfinished(Exception):
    """A piece that is not done, where only finished ones are wanted."""


class Pieces:
    """The pieces below one folder.

    Args:
        root: where they are kept.
        tell: told of each piece that is begun.
        finished_only: begin none; asking for one that is not done raises `Unfinished`.
    """

    def __init__(
        self, root: Path, tell: Callable[[str], None] = lambda _: None, *, finished_only: bool = False
    ) -> None:
        self.root, self._tell, self._finished_only = root, tell, finished_only
        self._spent: dict[str, float | None] = {}

    def get(self, name: str, settings: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Piece:
        """Return the piece of these settings; if it is not done, `make(folder)` does it and returns the result."""
        key = f"{name}-{settings_hash(settings)}"
        folder = self.root / key
        file = folder / RESULT
        if not file.exists():
            if self._finished_only:
                raise Unfinished(name)
            self._tell(name)
            folder.mkdir(parents=True, exist_ok=True)
            before = time.process_time()
            done = {"settings": settings, "result": make(folder), "processor_seconds": time.process_time() - before}
            stage = file.with_suffix(".tmp")
            stage.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            os.replace(stage, file)
        record = json.loads(file.read_text(encoding="utf-8"))
        self._spent[key] = record.get("processor_seconds")
        return Piece(folder, key, record["result"])

    def processor_seconds(self, prefix: str) -> float | None:
        """What the pieces took that were asked for so far and whose names begin so; None if one does not say."""
        spent = [seconds for key, seconds in self._spent.items() if key.startswith(prefix)]
        known = [seconds for seconds in spent if seconds is not None]
        return round(sum(known), 1) if len(known) == len(spent) else None


def settings_hash(settings: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of the settings and of the versions that give results their value."""
    described = {"settings": settings, "versions": versions()}
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()


def versions() -> dict[str, str]:
    """The versions that matter; Python's too, whose standard library is the text."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
