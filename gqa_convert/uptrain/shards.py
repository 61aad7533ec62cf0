"""Checkpoints that every process writes its shard of: torch's distributed checkpoint, read without running anything.

torch describes such a checkpoint in a pickle, `.metadata`, and keeps plain values beside tensors in further ones. Both
are read here by unpicklers that make that description, tensors and plain values, and nothing else. torch reshards while
it reads, so any number of processes resumes, one too.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gqa_convert.errors import CheckpointError

FOLDER = "shards"
"""Where a training checkpoint holds them."""
_METADATA = ".metadata"
_LONGEST = 1 << 28
_DESCRIPTION = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""What a description is made of, by module."""


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTION.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no description is made of")


def _memory_format(kind: Any, name: Any) -> Any:
    """What Python 3.11.2 (Debian 12's) pickles a member of torch's enumeration as: getattr of its name."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("it asks for an attribute, which no description is made of")
    return _MEM_FORMAT_ENCODING[name]


def read_description(folder: Path) -> Any:
    """Read `.metadata`.

    Returns:
        torch's `Metadata`.

    Raises:
        CheckpointError: if it is damaged, holds anything else, or names files outside of the folder.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = folder / _METADATA
    try:
        if path.stat().st_size > _LONGEST or not path.is_file():
            raise ValueError("it is no description")
        metadata = _DescriptionUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        files = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
        outside = [name for name in files if "/" in name or "\0" in name or name in ("", ".", "..")]
        if outside:
            raise ValueError(f"it names {outside[0]!r}, which lies outside of the folder")
        missing = [name for name in files if (folder / name).is_symlink() or not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    except Exception as error:  # a damaged pickle raises whatever its opcodes come to
        raise CheckpointError(f"{path}: cannot be used ({' '.join(str(error).split())[:160]}).") from error
    return metadata


def sharded_state(model: nn.Module, optimizer: Any, average: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What `write_shards` writes: parameters, optimiser state, perhaps an average, as they are now."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    parts: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer.state:
        # Before the first step there is nothing to save, and asking would make torch take an empty step, which
        # Adam counts: every update after it would differ.
        parts["optimizer"] = get_optimizer_state_dict(model, optimizer)
    if average is not None:
        parts["average"] = dict(average)
    return parts


def save_shards(folder: Path, model: nn.Module, optimizer: Any, average: Mapping[str, Tensor] | None = None) -> None:
    """Write parameters, optimiser state, and an average if there is one. See `write_shards`."""
    write_shards(folder, sharded_state(model, optimizer, average))


def write_shards(folder: Path, parts: dict[str, Any], *, group: Any | None = None) -> None:
    """Write a `sharded_state`; each process writes its part.

    Args:
        folder: the training checkpoint.
        parts: this process's.
        group: of processes to agree in; None for that of the training.

    Raises:
        Exception: whatever went wrong on the first process that failed; of a full disk OSError or RuntimeError.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with _quiet():
            save(parts, checkpoint_id=folder / FOLDER, process_group=group)
    except CheckpointException as error:  # no Exception: it would pass by whoever survives a full disk
        raise _reason(error) from error


def load_shards(folder: Path, model: nn.Module, optimizer: Any | None, *, together: bool) -> None:
    """Read what `save_shards` wrote, by however many processes.

    Args:
        folder: the training checkpoint.
        model: sharded or whole.
        optimizer: of its parameters; None to leave the optimiser's state alone.
        together: processes read together, each its part; else each reads everything for itself.

    Raises:
        CheckpointError: if the checkpoint is damaged, or of another model.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load

    keys = read_description(folder / FOLDER).state_dict_metadata
    with_optimizer = optimizer is not None and any(key.startswith("optimizer.") for key in keys)
    try:
        parts: dict[str, Any] = {"model": get_model_state_dict(model)}
        if with_optimizer:
            parts["optimizer"] = get_optimizer_state_dict(model, cast(Any, optimizer))
        with _quiet():
            load(parts, storage_reader=_reader(folder / FOLDER), planner=_planner(), no_dist=not together)
        set_model_state_dict(model, parts["model"])
        if with_optimizer:
            set_optimizer_state_dict(model, cast(Any, optimizer), parts["optimizer"])
    except (Exception, CheckpointException) as error:
        words = " ".join(str(_reason(error)).split())[:200]
        raise CheckpointError(f"{folder}: its shards cannot be read into this model ({words}).") from error


def has_sharded_average(folder: Path) -> bool:
    """Whether shards hold an average of the weights.

    Raises:
        CheckpointError: if their description is damaged.
    """
    return bool(_averaged(folder))


def _averaged(folder: Path) -> list[str]:
    keys = read_description(folder / FOLDER).state_dict_metadata
    return [key.removeprefix("average.") for key in keys if key.startswith("average.")]


def load_sharded_average(folder: Path, values: Mapping[str, Tensor], *, together: bool) -> None:
    """Read an average of weights into tensors that are there; for the rest see `load_shards`.

    Raises:
        CheckpointError: if the checkpoint is damaged, or of another model.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        parts = {"average": {name: values[name] for name in _averaged(folder)}}
        with _quiet():
            load(parts, storage_reader=_reader(folder / FOLDER), planner=_planner(), no_dist=not together)
    except KeyError as error:
        raise CheckpointError(f"{folder}: averages {error}, which is no parameter of this model.") from error
    except (Exception, CheckpointException) as error:
        words = " ".join(str(_reason(error)).split())[:200]
        raise CheckpointError(f"{folder}: its averaged weights cannot be read ({words}).") from error


def _reason(error: BaseException) -> Exception:
    """What went wrong on the first process that failed, of an error that torch has collected from all."""
    for failure, _ in getattr(error, "failures", {}).values():
        if isinstance(failure, Exception):
            return failure
    return error if isinstance(error, Exception) else RuntimeError(str(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning that one process reads or writes alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            metadata = read_description(folder)
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


def _planner() -> Any:
    from torch.distributed.checkpoint import default_planner

    class Planner(default_planner.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            plain = torch.load(value, weights_only=True)
            key = read_item.dest_index.fqn
            holder: Any = self.original_state_dict
            *path, last = self.mappings[key]
            for part in path:
                holder = holder[part]
            holder[last] = plain

    return Planner()
