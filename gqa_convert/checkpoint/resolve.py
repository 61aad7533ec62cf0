"""Which files hold a model's weights: the same choice, in the same order, that transformers 5 makes.

A name that comes from inside the folder (an index file's entries, `transformers_weights`) is not trusted: the file it
names must lie inside the folder, symlinks resolved. A Hugging Face hub cache is the one exception: there
`models--X--Y/snapshots/REV/file` is a symlink to `models--X--Y/blobs/HASH`, so a link may lead anywhere inside the
same `models--X--Y`. The fixed names (`model.safetensors`, `pytorch_model.bin`, the index files themselves) are the
user's own choice of folder, so a link under such a name is followed wherever it leads, as transformers does.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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


def hub_snapshot(folder: Path) -> tuple[Path, str] | None:
    """Return the `models--X--Y` folder and the revision if `folder` is a hub cache's snapshot or inside one."""
    real = Path(os.path.realpath(folder))
    for here in (real, *real.parents):
        repo = here.parent.parent
        if here.parent.name == "snapshots" and repo.name.startswith("models--"):
            return repo, here.name
    return None


def stays_inside(folder: Path, file: Path) -> bool:
    """Tell whether `file`, symlinks resolved, lies in `folder`, or in the same hub cache entry if it is a snapshot."""
    snapshot = hub_snapshot(folder)
    home = snapshot[0] if snapshot else Path(os.path.realpath(folder))
    try:
        return Path(os.path.realpath(file)).is_relative_to(home)
    except ValueError:
        return False  # a name that no file can have: half a surrogate pair, a NUL byte


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
        found = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable JSON index ({error}). Download it again.") from error
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no `weight_map` that says which file holds which tensor.")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: weight_map[{key!r}] is {name!r}, not a file name.")
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


def _no_weights(folder: Path) -> str:
    message = f"{folder}: no weights: neither {SAFE_WEIGHTS} nor {BIN_WEIGHTS}, nor an index of either"
    others = ("*.gguf", "*.h5", "*.msgpack", "consolidated*", "*.safetensors", "*.pt", "*.pth", "*.onnx", "*.bin")
    found = sorted({file.name for pattern in others for file in folder.glob(pattern)})
    if not found:
        return message + ". Download the model's weights into it."
    return (
        message + f"; found {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}. "
        "Convert the weights to safetensors with transformers' save_pretrained first."
    )
