"""A checkpoint folder as a value: what is in it, without loading any of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.dtypes import from_bytes, read_bytes
from gqa_convert.checkpoint.pickled import read_pickled
from gqa_convert.checkpoint.resolve import SAFE_WEIGHTS, WeightSet, resolve_weights
from gqa_convert.checkpoint.safetensors_file import TensorInfo, read_header
from gqa_convert.checkpoint.side_files import split_side_files
from gqa_convert.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
PROVENANCE = "gqa_convert.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One weight file.

    Attributes:
        name: the file name under which a converted copy of it is written (always `*.safetensors`).
        file: where it is read from.
        tensors: its tensors by key, in file order.
        metadata: the safetensors `__metadata__`; empty for pickled files.
        aliases: names that a pickled file gives to a tensor it also holds under another name, with that other name.
    """

    name: str
    file: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A lazy, read-only view of a checkpoint folder; make one with `Checkpoint.open`.

    Attributes:
        folder: as it was given.
        config: config.json, parsed.
        config_text: config.json as found: line ends and byte-order mark included.
        shards: the weight files, in the order in which transformers reads them.
        tensors: every tensor by key, over all shards.
        format: `"safetensors"` or `"bin"`.
        is_sharded: True if there are several weight files, so that a copy needs an index.
        side_files: files to carry into a copy (tokenizer, chat template, remote code, ...), relative to `folder`.
        left_files: files a copy leaves behind (other weights, training state), relative to `folder`.
        provenance: the folder's gqa_convert.json if it was itself converted.
        stored: None for a checkpoint as it lies in its folder; for a view of it in another family's terms, that one.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorInfo]
    format: str
    is_sharded: bool
    side_files: tuple[Path, ...]
    left_files: tuple[Path, ...]
    provenance: dict[str, Any] | None
    stored: Checkpoint | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read a folder's config and the headers of its weight files.

        Raises:
            CheckpointError: if something is missing, damaged, unsafe or inconsistent.
            UnsupportedModelError: if the folder holds an adapter, not a model.
        """
        folder = Path(folder)
        text = _config_text(folder)
        config = _json_object(folder / CONFIG, text)
        weights = resolve_weights(folder, config)
        shards = _shards(weights)
        tensors = _merged(shards)
        _check_index(weights, shards)
        side, left = split_side_files(folder, weights.files)
        return cls(
            folder=folder,
            config=config,
            config_text=text,
            shards=shards,
            tensors=tensors,
            format=weights.format,
            is_sharded=len(shards) > 1,
            side_files=side,
            left_files=left,
            provenance=_provenance(folder),
        )

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.total_bytes for shard in self.shards)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files the weights are read from."""
        return tuple(shard.file for shard in self.shards)

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor into memory of its own, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: if there is no such tensor, torch lacks its dtype, or the file can no longer be read.
        """
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(f"{self.folder}: holds no tensor {key!r}.")
        return read_tensor(info)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read a tensor from its file into memory of its own, on the CPU.

    Raises:
        CheckpointError: if torch lacks its dtype or the file can no longer be read.
    """
    if info.load is not None:
        return info.load()
    return from_bytes(read_bytes(info.file, info.offset, info.nbytes), info.dtype, info.shape)


def _config_text(folder: Path) -> str:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}. Give a folder that holds config.json and the weights.")
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{folder}: a PEFT adapter (adapter_config.json), not a whole model. Merge it into its base model first: "
            "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)."
        )
    try:
        return (folder / CONFIG).read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: has no config.json, so it is not a transformers checkpoint.") from error
    except OSError as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder / CONFIG}: is not UTF-8 text ({error.reason}).") from error


def _json_object(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not a JSON object.")
    return found


def _shards(weights: WeightSet) -> tuple[Shard, ...]:
    shards, count = [], len(weights.files)
    keep_names = weights.format == "safetensors" and SAFE_WEIGHTS not in {file.name for file in weights.files}
    for number, file in enumerate(weights.files, start=1):
        if count == 1:
            name = SAFE_WEIGHTS
        else:
            name = file.name if keep_names else f"model-{number:05d}-of-{count:05d}.safetensors"
        if weights.format == "safetensors":
            tensors, metadata = read_header(file)
            shards.append(Shard(name=name, file=file, tensors=tensors, metadata=metadata))
        else:
            tensors, aliases = read_pickled(file)
            shards.append(Shard(name=name, file=file, tensors=tensors, metadata={}, aliases=aliases))
    return tuple(shards)


def _merged(shards: tuple[Shard, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for key, info in shard.tensors.items():
            if key in tensors:
                raise CheckpointError(
                    f"{shard.file.parent}: {tensors[key].file.name} and {shard.file.name} both hold {key!r}. "
                    "One of them is stale: download the checkpoint again."
                )
            tensors[key] = info
    if not tensors:
        raise CheckpointError(f"{shards[0].file}: holds no tensors.")
    return tensors


def _check_index(weights: WeightSet, shards: tuple[Shard, ...]) -> None:
    held = {shard.file.name: shard.tensors.keys() | shard.aliases.keys() for shard in shards}
    for key, name in weights.weight_map.items():
        if key not in held[name]:
            raise CheckpointError(f"{weights.index}: says that {name} holds {key!r}, but it does not.")


def _provenance(folder: Path) -> dict[str, Any] | None:
    try:
        return _json_object(folder / PROVENANCE, (folder / PROVENANCE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / PROVENANCE}: cannot be read ({error}).") from error
