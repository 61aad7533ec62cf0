"""The safetensors file format: a strict reader of headers and a writer of them.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without gaps. The header is
read with our own parser because a converter copies byte spans between files: it needs absolute offsets, and it must
not trust a header that contradicts the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.dtypes import BITS, torch_dtype
from gqa_convert.checkpoint.files import open_regular
from gqa_convert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALIGNMENT", "MAX_HEADER_BYTES", "TensorInfo", "build_header", "read_header", "torch_dtype"]

MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors itself accepts."""

ALIGNMENT = 8
"""The tensors begin at a multiple of this many bytes."""

_MOST = 2**63 - 1
"""Largest size, offset and number of elements: what signed 64-bit integers hold, as in every reader of the format."""

_MOST_AXES = 64
_LONG_HEADER = 8 << 20
"""A header longer than this is looked at for how dense it is before it is parsed: see `_check_density`."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        key: name in the checkpoint.
        dtype: safetensors spelling, e.g. `"BF16"`.
        shape: sizes of the axes.
        file: the file that holds it.
        offset: absolute position of its first byte in `file`; meaningless if `load` is set.
        nbytes: bytes of its elements.
        load: set only where the bytes are no span of the file (strided or legacy pickled tensors): makes the tensor.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    load: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors in file order, and the file's `__metadata__`.

    Raises:
        CheckpointError: if the file is truncated, or its header is malformed or contradicts the file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length, text = _header_text(path, file.read(8), size, file.read)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    table = _parse(path, text)
    metadata = _metadata(path, table.pop("__metadata__", None))
    start = 8 + length
    tensors = [_tensor(path, key, entry, start) for key, entry in table.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_layout(path, tensors, start, size)
    return {tensor.key: tensor for tensor in tensors}, metadata


def build_header(
    entries: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str], padding: int = 0
) -> bytes:
    """Make the bytes that precede the tensors, the 8-byte length included, padded so that they end 8-byte aligned.

    Args:
        entries: key, safetensors dtype, shape and byte count of each tensor, in the order of the file.
        metadata: text to text; left out of the file if empty.
        padding: further bytes to add, a multiple of 8, to shift where the tensors begin.

    Raises:
        CheckpointError: if a key is used twice or the header would be longer than safetensors reads.
    """
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for key, dtype, shape, nbytes in entries:
        if key in table or key == "__metadata__":
            raise CheckpointError(f"tensor {key!r} would be written twice into one safetensors file.")
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT + padding)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"a safetensors header of {len(text):,} bytes is over the limit of {MAX_HEADER_BYTES:,}.")
    return len(text).to_bytes(8, "little") + text


def _header_text(path: Path, prefix: bytes, size: int, read: Callable[[int], bytes]) -> tuple[int, bytes]:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file. Download it again.")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length < 2:
        hint = " It is a git-lfs pointer: run `git lfs pull`." if prefix == b"version " else ""
        raise CheckpointError(
            f"{path}: not a safetensors file: its first 8 bytes announce a header of {length:,} bytes.{hint}"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated: its header alone needs {8 + length:,} bytes, the file has {size:,}. Download it again."
        )
    text = bytearray()
    while len(text) < length and (part := read(length - len(text))):
        text += part
    return length, bytes(text)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: its safetensors header names {twice!r} twice.")
        return table

    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        _check_density(text)
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        "".join(table).encode()  # JSON can spell half a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is not valid JSON ({str(error)[:160]}).") from error
    assert isinstance(table, dict)
    return table


def _check_density(text: bytes) -> None:
    """Refuse a long header of more tables and lists than entries of tensors have: parsing it would take gigabytes."""
    if len(text) > _LONG_HEADER and (text.count(b"{") > len(text) // 40 or text.count(b"[") > len(text) // 20):
        raise ValueError("it describes something else than tensors")


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: `__metadata__` in its header is not a table of text: {str(metadata)[:80]!a}.")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: `__metadata__` in its header holds half a surrogate pair, no text.") from error
    return metadata


def _tensor(path: Path, key: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        ok = isinstance(dtype, str) and isinstance(shape, list) and all(map(_is_count, [*shape, begin, end]))
        ok = ok and dtype.isascii() and len(shape) <= _MOST_AXES
    except (TypeError, KeyError, ValueError):
        ok = False
    if not ok or begin > end:
        raise CheckpointError(f"{path}: the header entry of {key!r} is malformed: {_short(entry)}.")
    nbytes, bits = end - begin, BITS.get(dtype)
    numel = math.prod(shape)
    if numel > _MOST:
        raise CheckpointError(f"{path}: {key!r} claims {dtype} {_short(shape)}: more elements than any tensor has.")
    if bits is not None and numel * bits != nbytes * 8:
        raise CheckpointError(
            f"{path}: {key!r} claims {dtype} {_short(shape)}, which takes {-(-numel * bits // 8):,} bytes, "
            f"but its header gives it {nbytes:,}."
        )
    return TensorInfo(key=key, dtype=dtype, shape=tuple(shape), file=path, offset=start + begin, nbytes=nbytes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _short(value: Any) -> str:
    """A value of the header on a line, cut; what is no text is escaped."""
    return ascii(value)[:120]


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Hold the tensors to the format: they fill the file from the header to its end, in a row."""
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            fault = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: {tensor.key!r} {fault}: it begins at byte {tensor.offset:,}, expected {position:,}."
            )
        position += tensor.nbytes
    if position > size:
        raise CheckpointError(f"{path}: truncated: expects {position:,} bytes, file has {size:,}; download it again.")
    if position < size:
        raise CheckpointError(
            f"{path}: {size - position:,} bytes follow the last tensor: its header describes {position:,} bytes, "
            f"file has {size:,}; download it again."
        )
