"""A checkpoint folder as a value: what is in it, without loading any of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.dtypes import BITS, from_bytes, read_bytes
from gqa_convert.checkpoint.files import MAX_CONFIG_BYTES, MAX_RECORD_BYTES, parse_object, read_object, read_regular
from gqa_convert.checkpoint.links import stays_inside
from gqa_convert.checkpoint.pickled import read_pickled
from gqa_convert.checkpoint.resolve import SAFE_WEIGHTS, WeightSet, resolve_weights, whole_weights
from gqa_convert.checkpoint.safetensors_file import TensorInfo, read_header
from gqa_convert.checkpoint.sanity import check_counts, check_filled, check_names, check_types
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
        tensors: its tensors by key, in file order; stale copies that an index leads past are not among them.
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
        notes: what a user should know of how the weights were read.
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
    notes: tuple[str, ...] = ()
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
        config = parse_object(folder / CONFIG, text)
        weights = resolve_weights(folder, config)
        shards = _shards(weights)
        _check_index(weights, shards)
        shards, notes = _without_stale(weights, shards)
        tensors = {key: info for shard in shards for key, info in shard.tensors.items()}
        if not tensors:
            raise CheckpointError(f"{shards[0].file}: holds no tensors.")
        if "auto_map" not in config:  # code of its own may name its modules as it likes
            check_names(folder, tensors)
        check_filled(folder, tensors)
        check_types(folder / CONFIG, config)
        check_counts(folder / CONFIG, config, len(tensors))
        _check_generation(folder)
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
            provenance=read_record(folder),
            notes=notes,
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
        whole = whole_weights(folder)
        if whole is not None:
            raise UnsupportedModelError(
                f"{folder}: adapter_config.json says this is a PEFT adapter, but {whole.name} holds a whole model. "
                "If the adapter was merged into it, remove adapter_config.json. Merge it otherwise: merge_and_unload()."
            )
        raise UnsupportedModelError(
            f"{folder}: a PEFT adapter (adapter_config.json), not a whole model. Merge it into its base model first: "
            "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)."
        )
    try:
        return read_regular(folder / CONFIG, MAX_CONFIG_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: has no config.json, so it is not a transformers checkpoint.") from error
    except OSError as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder / CONFIG}: is not UTF-8 text ({error.reason}).") from error


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
            _check_formats(file, tensors)
            shards.append(Shard(name=name, file=file, tensors=tensors, metadata=metadata))
        else:
            tensors, aliases = read_pickled(file)
            shards.append(Shard(name=name, file=file, tensors=tensors, metadata={}, aliases=aliases))
    return tuple(shards)


def _check_generation(folder: Path) -> None:
    """Refuse a generation_config.json that is no JSON object: a copy of the folder would not load for it."""
    path = folder / "generation_config.json"
    if path.is_file() and stays_inside(folder, path):
        read_object(path, MAX_CONFIG_BYTES)


def _without_stale(weights: WeightSet, shards: tuple[Shard, ...]) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """Drop the older copies of tensors that several files hold, where index and transformers agree which is in force.

    transformers reads the files in order and keeps the last copy of a tensor, whatever the index says.
    """
    last: dict[str, Shard] = {}
    stale: set[tuple[str, str]] = set()
    for shard in shards:
        for key in (*shard.tensors, *shard.aliases):
            if key in last:
                named = weights.weight_map.get(key)
                if named != shard.file.name and named in {other.file.name for other in shards}:
                    advice = f"The index means {named}, but transformers takes the last file: remove the other copy."
                else:
                    advice = "One of them is stale: download the checkpoint again."
                if named != shard.file.name:
                    raise CheckpointError(
                        f"{shard.file.parent}: {last[key].file.name} and {shard.file.name} both hold {key!r}. {advice}"
                    )
                stale.add((last[key].name, key))
            last[key] = shard
    if not stale:
        return shards, ()
    note = f"{len(stale)} stale copies of tensors are left out: the index names another file for them"
    return tuple(_without(shard, {key for name, key in stale if name == shard.name}) for shard in shards), (note,)


def _without(shard: Shard, stale: set[str]) -> Shard:
    """Take tensors out of a shard; a name that shared one of them keeps it."""
    tensors: dict[str, TensorInfo] = {}
    heirs: dict[str, str] = {}
    aliases = {alias: kept for alias, kept in shard.aliases.items() if alias not in stale}
    for key, info in shard.tensors.items():
        heir = key if key not in stale else next((alias for alias, kept in aliases.items() if kept == key), None)
        if heir is not None:
            tensors[heir] = info if heir == key else replace(info, key=heir)
            heirs[key] = heir
    aliases = {alias: heirs[kept] for alias, kept in aliases.items() if heirs[kept] != alias}
    return replace(shard, tensors=tensors, aliases=aliases)


def _check_formats(file: Path, tensors: dict[str, TensorInfo]) -> None:
    """Let formats of numbers that are newer than ours be copied, if the installed safetensors can read the file."""
    unknown = next((info for info in tensors.values() if info.dtype not in BITS), None)
    if unknown is None:
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: {unknown.key!r} is of dtype {unknown.dtype!r}, which the installed safetensors does not know. "
            "Download the file again, or install a release that does."
        ) from error


def _check_index(weights: WeightSet, shards: tuple[Shard, ...]) -> None:
    held = {shard.file.name: shard.tensors.keys() | shard.aliases.keys() for shard in shards}
    for key, name in weights.weight_map.items():
        if key not in held[name]:
            raise CheckpointError(f"{weights.index}: says that {name} holds {key!r}, but it does not.")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read a folder's own gqa_convert.json; None if it has none.

    Raises:
        CheckpointError: if it is a link out of the folder, no regular file, or no record.
    """
    path = folder / PROVENANCE
    try:
        record = parse_object(path, read_regular(path, MAX_RECORD_BYTES, inside=folder).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    _check_record(path, record)
    return record


def _check_record(path: Path, record: dict[str, Any]) -> None:
    parts: list[tuple[str, Any, type, str]] = [
        (name, record.get(name, {}), dict, "JSON object") for name in ("tool", "source", "conversion", "uptraining")
    ]
    conversion = record.get("conversion")
    if isinstance(conversion, dict):
        parts += [("conversion.method", conversion.get("method", ""), str, "text")]
        parts += [("conversion.seed", conversion.get("seed", 0), int, "integer")]
    for name, value, kind, called in parts:
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, not {called}: no record of a conversion."
            )
