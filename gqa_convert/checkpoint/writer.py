"""Writes safetensors shards from spans of other files and from tensors computed one at a time."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_convert.checkpoint.copying import BLOCK, copy_span, reserve, write_all
from gqa_convert.checkpoint.dtypes import BITS, dtype_name, tensor_bytes
from gqa_convert.checkpoint.safetensors_file import ALIGNMENT, TensorInfo, build_header
from gqa_convert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

OnBytes = Callable[[int], None]
"""Told how many bytes have just been written."""


@dataclass(frozen=True, kw_only=True)
class TargetTensor:
    """A tensor to be written; exactly one of `source` and `produce` is set.

    Attributes:
        key: name in the new file.
        dtype: safetensors spelling.
        shape: sizes of the axes.
        source: an existing tensor of that dtype and shape, whose bytes are copied untouched.
        produce: computes the tensor, of just that dtype and shape, when its turn comes.

    Raises:
        ValueError: if both or neither of `source` and `produce` are set, or `source` is of another dtype or shape.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None = None
    produce: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.produce is None):
            raise ValueError(f"{self.key}: set exactly one of source and produce")
        if self.source is not None and (self.source.dtype, self.source.shape) != (self.dtype, self.shape):
            raise ValueError(
                f"{self.key}: {self.dtype} {self.shape} cannot be copied from {self.source.dtype} {self.source.shape}"
            )
        if self.source is None and self.dtype not in BITS:
            raise ValueError(f"{self.key}: unknown dtype {self.dtype}")

    @classmethod
    def copy_of(cls, info: TensorInfo) -> TargetTensor:
        """A tensor carried over as it is."""
        return cls(key=info.key, dtype=info.dtype, shape=info.shape, source=info)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return self.source.nbytes if self.source is not None else math.prod(self.shape) * BITS[self.dtype] // 8


def write_shard(
    path: Path,
    tensors: Sequence[TargetTensor],
    metadata: dict[str, str],
    on_bytes: OnBytes | None = None,
    sync: bool = True,
) -> None:
    """Write one safetensors file, in the given order of tensors.

    Neighbours that are also neighbours in their source file are copied as one span by the kernel. Blanks at the end of
    the header (the format allows them) put the tensors at the same place within a disk block as in the source, which
    the kernel copies more than twice as fast. Memory: one produced tensor at a time.

    Args:
        path: file to create; an existing one is replaced.
        tensors: what it holds.
        metadata: its `__metadata__`; `format: pt` is added if it names no format.
        on_bytes: told of every piece of tensor data written, 64 MiB at most at a time.
        sync: flush the file to the disk before returning.

    Raises:
        CheckpointError: if a source file ends early, or a produced tensor is not of the announced dtype and shape.
        OSError: if writing fails (disk full, ...).
    """
    tell = on_bytes or (lambda _: None)
    parts = list(_parts(tensors))
    header = _header(tensors, {**metadata, "format": metadata.get("format", "pt")}, parts)
    with ExitStack() as stack:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        stack.callback(os.close, target)
        reserve(target, len(header) + sum(tensor.nbytes for tensor in tensors))
        write_all(target, memoryview(header), lambda _: None)
        sources: dict[Path, int] = {}
        for part in parts:
            if isinstance(part, TargetTensor):
                write_all(target, tensor_bytes(_produced(part)), tell)
                continue
            if part.file not in sources:
                sources[part.file] = _open_source(part.file)
                stack.callback(os.close, sources[part.file])
            copy_span(sources[part.file], target, part.offset, part.nbytes, tell)
        if sync:
            os.fsync(target)


def write_index(path: Path, weight_map: dict[str, str], total_size: int, total_parameters: int) -> None:
    """Write `model.safetensors.index.json` in the form of transformers' `save_pretrained`.

    Args:
        path: file to create.
        weight_map: tensor key to shard file name.
        total_size: bytes of all tensors.
        total_parameters: elements of all tensors.

    Raises:
        OSError: if writing fails.
    """
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, line ends as they are in `text`, and flush it to the disk.

    Raises:
        OSError: if writing fails.
    """
    with open(path, "wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # in JSON, the escape of a name that is no text
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class _Span:
    """Bytes that lie in a row in a source file and in the target."""

    file: Path
    offset: int
    nbytes: int


def _parts(tensors: Sequence[TargetTensor]) -> Iterator[_Span | TargetTensor]:
    """Join neighbouring copies into spans; empty tensors take no part."""
    span: _Span | None = None
    for tensor in tensors:
        info = tensor.source
        if tensor.nbytes == 0:
            continue
        if info is not None and info.load is None:
            if span is not None and (info.file, info.offset) == (span.file, span.offset + span.nbytes):
                span = _Span(span.file, span.offset, span.nbytes + info.nbytes)
                continue
            if span is not None:
                yield span
            span = _Span(info.file, info.offset, info.nbytes)
            continue
        if span is not None:
            yield span
            span = None
        yield tensor
    if span is not None:
        yield span


def _header(tensors: Sequence[TargetTensor], metadata: dict[str, str], parts: Sequence[_Span | TargetTensor]) -> bytes:
    """Make the header, padded so that as many bytes as possible keep their place within a block."""
    entries = [(tensor.key, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors]
    header = build_header(entries, metadata)
    matched: Counter[int] = Counter()
    position = len(header)
    for part in parts:
        if isinstance(part, _Span):
            matched[(part.offset - position) % BLOCK] += part.nbytes
        position += part.nbytes
    choices = [shift for shift in matched if shift % ALIGNMENT == 0]
    best = max(choices, key=lambda shift: (matched[shift], -shift), default=0)
    return build_header(entries, metadata, padding=best) if best else header


def _produced(target: TargetTensor) -> Tensor:
    make = target.produce or (target.source.load if target.source is not None else None)
    assert make is not None
    tensor = make()
    computed, announced = (dtype_name(tensor.dtype), tuple(tensor.shape)), (target.dtype, target.shape)
    if computed != announced:
        (dtype, shape), (wanted, wanted_shape) = computed, announced
        raise CheckpointError(
            f"{target.key}: computed as {dtype} {list(shape)}, announced as {wanted} {list(wanted_shape)}."
        )
    return tensor


def _open_source(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe in its place ends the copy
    except OSError as error:
        raise CheckpointError(f"{file}: can no longer be read ({error.strerror}).") from error
