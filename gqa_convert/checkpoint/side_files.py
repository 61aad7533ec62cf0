"""Which of a checkpoint's files go along unchanged: tokenizer, generation config, chat templates, remote code, licence.

Weights in any format, indexes, training state and hidden files stay behind: a stale `model.safetensors` or
`pytorch_model.bin` beside the new shards would be loaded in their place.
"""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from gqa_convert.checkpoint.files import open_inside
from gqa_convert.checkpoint.links import stays_inside
from gqa_convert.errors import CheckpointError

_WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.index*.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.ckpt.*",
    "*.distcp",
    "*.gguf",
    "*.ggml",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.tflite",
    "*.mlmodel",
    "*.npz",
    "*.nemo",
    "*.llamafile",
    "consolidated*",
    "adapter_config.json",
    "trainer_state.json",
)
_SKIPPED_FOLDERS = (
    "original",
    "onnx",
    "openvino",
    "coreml",
    "flax",
    "tf",
    "gguf",
    "checkpoint-*",
    "global_step*",
    "runs",
    "wandb",
    "__pycache__",
    "*.mlpackage",
    ".*",
)
_NEEDED = frozenset({"spk_dict.pt"})  # Qwen2.5-Omni's voices: its from_pretrained reads them
_REWRITTEN = frozenset({"config.json", "gqa_convert.json"})


def is_side_file(relative: PurePath) -> bool:
    """Tell by its name whether a file of a checkpoint goes along (config.json and gqa_convert.json are rewritten)."""
    *folders, name = relative.parts
    return not (
        name.startswith(".")
        or (not folders and name in _REWRITTEN)
        or (name not in _NEEDED and _matches(name, _WEIGHT_PATTERNS))
        or any(_matches(folder, _SKIPPED_FOLDERS) for folder in folders)
    )


def split_side_files(folder: Path, weight_files: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Sort a checkpoint's files, other than its weights and config.json, into those to copy and those to leave.

    Args:
        folder: the checkpoint's folder.
        weight_files: the files the weights are read from; they appear in neither list.

    Returns:
        Files to copy and files (or whole folders) left behind, both relative to `folder`, sorted.

    Raises:
        CheckpointError: if a file to copy is a link to nothing, or one that leaves the folder (the output would carry
            a stranger's file).
    """
    copied: list[Path] = []
    left: list[Path] = []
    mine = {file.relative_to(folder) for file in weight_files} | {Path(name) for name in _REWRITTEN}
    for root, folders, files in os.walk(folder):
        base = Path(root).relative_to(folder)
        for name in sorted(folders):
            if _matches(name, _SKIPPED_FOLDERS) or (Path(root) / name).is_symlink():
                folders.remove(name)
                left.append(base / name)
        for relative in (base / name for name in files):
            if relative in mine:
                continue
            if not is_side_file(relative):
                left.append(relative)
            elif os.path.islink(folder / relative) or os.path.isfile(folder / relative):
                _check_link(folder, folder / relative)
                copied.append(relative)
    return tuple(sorted(copied)), tuple(sorted(left))


def side_file_bytes(folder: Path, relative: Path) -> int:
    """Size of a side file.

    Raises:
        CheckpointError: if it is gone.
    """
    try:
        return os.stat(folder / relative).st_size
    except OSError as error:
        raise CheckpointError(f"{folder / relative}: can no longer be read ({error.strerror}).") from error


def copy_side_file(folder: Path, relative: Path, target: Path, *, name: str = "") -> None:
    """Copy one side file of `folder` to the same place below `target`, unless it has become a link out of the folder.

    `name` is where it goes below `target` instead, if it goes elsewhere.

    Raises:
        CheckpointError: if it is gone, no regular file any more, or leads out of the folder now.
        OSError: if it cannot be written.
    """
    copied = target / (name or relative)
    copied.parent.mkdir(parents=True, exist_ok=True)
    try:
        source = open_inside(folder, folder / relative)
    except OSError as error:
        raise CheckpointError(f"{folder / relative}: can no longer be read ({error.strerror}).") from error
    with source, open(copied, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _check_link(folder: Path, file: Path) -> None:
    if not stays_inside(folder, file):
        raise CheckpointError(f"{file}: a link that leaves the model folder. Refused: put the file itself there.")
    if not os.path.isfile(file):
        raise CheckpointError(f"{file}: a link to nothing ({os.readlink(file)}). Download it again, or remove it.")
