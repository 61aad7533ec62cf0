"""A fingerprint of a checkpoint's weights that reads little of them: enough to notice that a folder was made anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError

_PIECES = 256
_PIECE = 64 << 10


def sampled_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the sizes of the weight files and 256 pieces of 64 KiB of each, evenly spread; files by name.

    Merging by another method or training changes a few percent of the bytes at the least, so some pieces lie in what
    changed. Headers and modification times do not tell such files apart, and whole hashes read tens of gigabytes.

    Raises:
        CheckpointError: if a file can no longer be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(checkpoint.weight_files, key=lambda path: path.name):
            _add(digest, file)
    except OSError as error:
        raise CheckpointError(f"{checkpoint.folder}: can no longer be read ({error}).") from error
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    step = max(_PIECE, size // _PIECES)
    with open(file, "rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            digest.update(stream.read(_PIECE))
