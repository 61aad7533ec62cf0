"""The bytes of stored tensors: read a piece at a time, compared, and summed up in a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from gqa_convert.checkpoint.dtypes import read_bytes, tensor_bytes
from gqa_convert.checkpoint.safetensors_file import TensorInfo

_PIECE = 16 << 20


def tensor_pieces(info: TensorInfo) -> Iterator[memoryview]:
    """Read a tensor's bytes, row-major and little-endian, 16 MiB at a time where they are a span of a file.

    Raises:
        CheckpointError: if the file can no longer be read.
    """
    if info.load is not None:
        yield tensor_bytes(info.load())
        return
    for start in range(0, info.nbytes, _PIECE):
        yield read_bytes(info.file, info.offset + start, min(_PIECE, info.nbytes - start)).numpy().data


def same_bytes(info: TensorInfo, expected: Iterable[memoryview]) -> bool:
    """True if a stored tensor's bytes are the expected ones, in whatever pieces these come. Raises as `tensor_pieces`.

    Reads on to the end of neither once they differ.
    """
    left, right = _Stream(tensor_pieces(info)), _Stream(iter(expected))
    while True:
        count = min(left.available(), right.available())
        if count == 0:
            return left.available() == right.available()
        if bytes(left.take(count)) != bytes(right.take(count)):  # a view compares element by element
            return False


class _Stream:
    """Pieces, to be taken in other sizes than they come in."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def available(self) -> int:
        """Bytes that can be taken at once; 0 at the end only."""
        while len(self._piece) == 0:
            following = next(self._pieces, None)
            if following is None:
                return 0
            self._piece = following
        return len(self._piece)

    def take(self, count: int) -> memoryview:
        taken, self._piece = self._piece[:count], self._piece[count:]
        return taken


def bytes_digest(*pieces: memoryview) -> str:
    """SHA-256 of bytes, in hex digits."""
    return _digest(pieces)


def tensor_digest(info: TensorInfo) -> str:
    """SHA-256 of a stored tensor's bytes, in hex digits. Raises as `tensor_pieces`."""
    return _digest(tensor_pieces(info))


def _digest(pieces: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
