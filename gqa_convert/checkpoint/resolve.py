"""Which files hold a model's weights: the same choice, in the same order, that transformers 5 makes.

A name that comes from inside the folder (an index file's entries, `transformers_weights`) is not trusted: the file it
names must lie inside the folder (see `links`). The fixed names (`model.safetensors`, `pytorch_model.bin`, the index
files themselves) are the user's own choice of folder, so a link under such a name is followed wherever it leads, as
transformers does.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gqa_convert.checkpoint.files import MAX_RECORD_BYTES, parse_object, read_regular
from gqa_convert.checkpoint.links import stays_inside
from gqa_convert.errors import CheckpointError

SAFE_WEIGHTS = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"
BIN_WEIGHTS = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True, kw_only=True)
class WeightSet:
    """The weight files of a checkpoint.

    Attributes:
        format: `"safetensors"` or `"bin"`.
        files: the files, in the order in which they are read.
        index: the index file, if the checkpoint has one.
        weight_map: tensor key to file name, as the index has it; empty without an index.
    """

    format: str
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, str]


def resolve_weights(folder: Path, config: dict[str, Any]) -> WeightSet:
    """Find the weight files that transformers would load.

    Args:
        folder: the checkpoint's folder.
        config: its parsed config.json; `transformers_weights` names the file outright.

    Raises:
        CheckpointError: if there are none, one is missing, or one lies outside the folder.
    """
    explicit = config.get("transformers_weights")
    if explicit is not None:
        return _explicit(folder, explicit)
    if (folder / SAFE_WEIGHTS).is_file():
        return WeightSet(format="safetensors", files=(folder / SAFE_WEIGHTS,), weight_map={})
    if (folder / SAFE_INDEX).is_file():
        return _from_index(folder, folder / SAFE_INDEX, "safetensors")
    if (folder / BIN_WEIGHTS).is_file():
        return WeightSet(format="bin", files=(folder / BIN_WEIGHTS,), weight_map={})
    if (folder / BIN_INDEX).is_file():
        return _from_index(folder, folder / BIN_INDEX, "bin")
    raise CheckpointError(_no_weights(folder))


def _explicit(folder: Path, name: Any) -> WeightSet:
    where = f"{folder}/config.json: transformers_weights={name!r}"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{where}: must name a *.safetensors or *.safetensors.index.json file.")
    pure = PurePosixPath(name)
    file = folder / name
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not stays_inside(folder, file):
        raise CheckpointError(f"{where}: leads outside the model folder. Refused.")
    if not os.path.isfile(file):
        raise CheckpointError(f"{where}: there is no such file.")
    if name.endswith(".index.json"):
        return _from_index(folder, file, "safetensors")
    return WeightSet(format="safetensors", files=(file,), weight_map={})


def _from_index(folder: Path, index: Path, kind: str) -> WeightSet:
    weight_map = read_weight_map(index)
    suffixes = (".safetensors",) if kind == "safetensors" else (".bin", ".pt", ".pth")
    files = []
    for name in sorted(set(weight_map.values())):
        file = _shard(folder, index, name)
        if not name.endswith(suffixes):
            raise CheckpointError(f"{index}: names {name!r}, which is not a {suffixes[0]} file.")
        files.append(file)
    return WeightSet(format=kind, files=tuple(files), index=index, weight_map=weight_map)


def read_weight_map(index: Path) -> dict[str, str]:
    """Read which file holds which tensor from an index file; the file names are not checked.

    Raises:
        CheckpointError: if it is not an index.
    """
    try:
        text = read_regular(index, MAX_RECORD_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index}: not a readable JSON index ({error}). Download it again.") from error
    weight_map = parse_object(index, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no `weight_map` that says which file holds which tensor.")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: weight_map[{key!r}] is {ascii(name)[:80]}, not a file name.")
    return weight_map


def _shard(folder: Path, index: Path, name: str) -> Path:
    """Turn an index entry into a path, refusing whatever is not a plain file inside the folder."""
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise CheckpointError(f"{index}: names {name!r}, which is not a plain file name inside the folder. Refused.")
    file = folder / name
    if not stays_inside(folder, file):
        raise CheckpointError(
            f"{index}: names {name!r}, which leads outside the model folder. Refused: "
            "put the file itself into the folder."
        )
    if not os.path.isfile(file):
        raise CheckpointError(f"{index}: names {name!r}, but there is no such file in {folder}. Download it again.")
    return file


def whole_weights(folder: Path) -> Path | None:
    """The file by which transformers would recognise a whole model's weights in a folder, or None."""
    names = (SAFE_WEIGHTS, SAFE_INDEX, BIN_WEIGHTS, BIN_INDEX)
    return next((folder / name for name in names if (folder / name).is_file()), None)


_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_VARIANT = re.compile(r"(model|pytorch_model)\.(?!safetensors|bin|index)([\w-]+)\.(safetensors|bin)")
_VARIANT_INDEX = re.compile(r"(model\.safetensors|pytorch_model\.bin)\.index\.([\w-]+)\.json")


def _no_weights(folder: Path) -> str:
    """Say what lies in the folder in place of weights, and what to do about it."""
    missing = f"{folder}: no weights: neither {SAFE_WEIGHTS} nor {BIN_WEIGHTS}, nor an index of either"
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"{folder}: cannot be read ({error.strerror})."
    return missing + (_seen_instead(folder, names) or ". Download the model's weights into it.")


def _seen_instead(folder: Path, names: list[str]) -> str:
    for name in (SAFE_WEIGHTS, SAFE_INDEX, BIN_WEIGHTS, BIN_INDEX):
        if name in names:
            what = "no regular file" if os.path.exists(folder / name) else "a link to nothing"
            return f": {name} is {what}. Put the file itself there."
    for name in names:
        if (variant := _VARIANT.fullmatch(name)) and (folder / name).is_file():
            plain = f"{variant[1]}.{variant[3]}"
            return f"; {name} is their variant {variant[2]!r}. Rename it to {plain}, as transformers expects."
        if index := _VARIANT_INDEX.fullmatch(name):
            return f"; {name} is the index of their variant {index[2]!r}. Rename it to {index[1]}.index.json."
    shards = [(name, shard) for name in names if (shard := _SHARD.fullmatch(name))]
    if shards:
        index_name = SAFE_INDEX if shards[0][1][2] == "safetensors" else BIN_INDEX
        return f"; {_listed([name for name, _ in shards])} are shards, but {index_name} is missing. Download it too."
    zero = [name for name in names if name.startswith("global_step") and (folder / name).is_dir()]
    if zero or "zero_to_fp32.py" in names:
        return (
            f"; {_listed(zero or ['zero_to_fp32.py'])}: a DeepSpeed training checkpoint. Make whole weights of it: "
            "python zero_to_fp32.py . pytorch_model.bin"
        )
    parts = [name for name in names if name.endswith(".distcp")]
    parts += [name for name in names if (folder / name).is_dir() and any((folder / name).glob("*.distcp"))]
    if parts:
        return (
            f"; {_listed(parts)}: a distributed checkpoint (*.distcp). Make whole weights of it: "
            "accelerate merge-weights, or torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
        )
    others = (".gguf", ".h5", ".msgpack", ".safetensors", ".pt", ".pth", ".onnx", ".bin")
    unread = [name for name in names if name.endswith(others) or name.startswith("consolidated")]
    if not unread:
        return ""
    return f"; found {_listed(unread)}. Convert the weights to safetensors with transformers' save_pretrained first."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
