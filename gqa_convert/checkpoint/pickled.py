"""Pickled checkpoints (`pytorch_model.bin`): read without running their code and without loading their weights.

torch's own restricted unpickler reads the file under `FakeTensorMode`, which gives every tensor's dtype, shape, strides
and the absolute offset of its storage in the file, but no weights. A contiguous tensor is then a span of bytes like one
in a safetensors file and is copied by the same code. What is not such a span (strided tensors, the legacy format) gets
a `load` of its own.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.dtypes import dtype_name, from_bytes, read_bytes
from gqa_convert.checkpoint.safetensors_file import TensorInfo
from gqa_convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch


_SLACK = 1 << 20
"""Bytes that views may repeat in any file."""


def read_pickled(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """List the tensors of a pickled checkpoint file, in file order.

    Names that share one tensor (tied weights) are reduced to the first: parameters are pickled in the order in which
    the model registers them, so the first is the input embedding or the shared table, which is also the name that
    transformers keeps when it saves.

    Returns:
        The tensors, and the dropped names, each with the name that was kept in its place.

    Raises:
        CheckpointError: if the file is damaged, is no table of tensors, or would run code when unpickled.
    """
    records = _records(path)
    if records is None:
        return _read_legacy(path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        table = _unpickle(path)
    described = [(_describe(path, key, tensor, records), tensor.stride()) for key, tensor in table.items()]
    return _untie(path, described)


def _untie(
    path: Path, described: Iterable[tuple[TensorInfo, tuple[int, ...]]]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Keep the first of the names that share the same view (offset, dtype, shape, strides) of the same bytes.

    Views may repeat their bytes (an expanded buffer, a transposed tied table), but not without bound: a file of a few
    kilobytes could claim to hold terabytes.
    """
    tensors: dict[str, TensorInfo] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for info, stride in described:
        kept = seen.setdefault((info.offset, info.dtype, info.shape, stride), info.key)
        if kept == info.key or info.nbytes == 0:
            tensors[info.key] = info
        else:
            aliases[info.key] = kept
    size, claimed = path.stat().st_size, sum(info.nbytes for info in tensors.values())
    if claimed > 2 * size + _SLACK:
        largest = max(tensors.values(), key=lambda info: info.nbytes)
        raise CheckpointError(
            f"{path}: {size:,} bytes claim to hold tensors of {claimed:,}, such as {largest.key!r} of shape "
            f"{str(list(largest.shape))[:80]}: views that repeat their bytes. Save contiguous tensors."
        )
    return tensors, aliases


def _records(path: Path) -> dict[int, int] | None:
    """Map the absolute offset of every record in the zip archive to its size; None if the file is no archive."""
    records = {}
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: its records are compressed. Save it again with torch.save.")
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise CheckpointError(f"{path}: written on a big-endian machine. Save it again on a usual one.")
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                records[entry.header_offset + 30 + name + extra] = entry.file_size
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises errors of many kinds over a damaged archive
        raise CheckpointError(f"{path}: damaged ({error}). Download it again.") from error
    return records


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: the outcome below says all
            table = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"its pickle names {named[1]}" if named else "it is damaged or not a pickle of tensors alone"
        raise CheckpointError(
            f"{path}: {what}, so unpickling could run code. It was refused and nothing in it was executed."
        ) from error
    except Exception as error:  # torch.load raises errors of every kind over a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged ({reason[:160]}). Download it again.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: holds a {type(table).__name__}, not a table of tensors.")
    for key, value in table.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: a key is a {type(key).__name__}, not a tensor's name.")
        if value is None and key.endswith("_extra_state"):
            continue  # what layers of TransformerEngine leave where they have nothing to say; transformers passes it by
        if isinstance(value, dict) and any(isinstance(inner, torch.Tensor) for inner in value.values()):
            raise CheckpointError(
                f"{path}: {key!r} is a dict that holds the tensors: a training checkpoint. Save that table alone."
            )
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor. Not a model's weights?")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{path}: {key!a} is no text, so no tensor's name.") from error
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path}: {key!r} is a sparse or quantised tensor. Save it as a plain one first.")
    return {key: value for key, value in table.items() if value is not None}


def _describe(path: Path, key: str, tensor: torch.Tensor, records: dict[int, int]) -> TensorInfo:
    storage = tensor.untyped_storage()
    begin, length = getattr(storage, "_checkpoint_offset", None), storage.nbytes()
    # A tensor that claims to reach beyond its storage has made torch lengthen it, so this catches that lie too.
    if begin is None or records.get(begin, -1) < length:
        raise CheckpointError(f"{path}: the bytes of {key!r} are not where its pickle says. Download it again.")
    shape, stride = tuple(tensor.shape), tensor.stride()
    width, first, dtype = tensor.element_size(), tensor.storage_offset(), dtype_name(tensor.dtype)
    load: Callable[[], torch.Tensor] | None = None
    if not tensor.is_contiguous():
        elements = length // width

        def load() -> torch.Tensor:
            flat = from_bytes(read_bytes(path, begin, elements * width), dtype, (elements,))
            return flat.as_strided(shape, stride, first).contiguous()

    return TensorInfo(
        key=key,
        dtype=dtype,
        shape=shape,
        file=path,
        offset=begin + first * width,
        nbytes=tensor.numel() * width,
        load=load,
    )


class _LegacyFile:
    """A file of the format before torch 1.6, which cannot be read in parts: loaded on first use, and kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: dict[str, torch.Tensor] | None = None

    def load(self, key: str) -> torch.Tensor:
        if self.table is None:
            self.table = _unpickle(self.path)
        return self.table[key].clone().contiguous()


def _read_legacy(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    file = _LegacyFile(path)
    described = []
    for key, tensor in _unpickle(path).items():
        info = TensorInfo(
            key=key,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            file=path,
            # No offset in the file is known: the address in memory tells shared tensors apart just as well.
            offset=tensor.data_ptr(),
            nbytes=tensor.numel() * tensor.element_size(),
            load=partial(file.load, key),
        )
        described.append((info, tensor.stride()))
    return _untie(path, described)
