"""Write results so that a file is whole or not there. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gqa_convert.errors import OutputError

_LARGEST_JSON = 256 << 20
"""Bytes; results are a thousandth of it at most."""


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON by way of a temporary file beside it.

    Raises:
        OutputError: if it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text by way of a temporary file beside it.

    Raises:
        OutputError: if it cannot be written.
    """
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one beside it; a link in its place is replaced, not followed.

    Raises:
        OutputError: if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error


def read_json(path: Path) -> Any | None:
    """Read a JSON file; None if it is missing, no regular file, huge or damaged (a run then does that part again)."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
