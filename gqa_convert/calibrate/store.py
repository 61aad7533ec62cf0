"""Results of finished layers on disk, so that an interrupted run goes on where it stopped.

One safetensors file per layer, written under another name and renamed, in a folder named after a hash of everything
that the result depends on. Each file carries SHA-256 sums of its tensors and of what describes them; one that is
damaged, if by a single bit, or was made from anything else, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.dtypes import dtype_name, tensor_bytes
from gqa_convert.checkpoint.provenance import source_identity
from gqa_convert.checkpoint.reader import read_tensor
from gqa_convert.checkpoint.safetensors_file import TensorInfo, read_header
from gqa_convert.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.checkpoint.reader import Checkpoint

_FORMAT = 2

_Described = tuple[dict[str, TensorInfo], dict[str, Any], dict[str, str]]
"""A file's tensors, its report, and the SHA-256 of each tensor's bytes."""

STORES = re.compile(r"(layers|moments|text)-[0-9a-f]{16}")
"""Names of the folders that stores make."""


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a source's weights from any others', wherever the folder lies: hashes of its files' whole contents."""
    known = source_identity(checkpoint)
    if any("blob" not in file for file in known["files"]):
        known = source_identity(checkpoint, hash_files=True)
    return {
        "config": known["config_sha256"],
        "files": [file.get("sha256") or file["blob"] for file in known["files"]],
    }


class LayerStore:
    """The results of one kind for one set of inputs.

    Attributes:
        folder: where they are: `<work>/<kind>-<16 hex digits of the hash of the key>`.

    Raises:
        OutputError: if the folder cannot be made.
    """

    def __init__(self, work: Path, kind: str, key: Mapping[str, Any]) -> None:
        self._key = json.dumps({"format": _FORMAT, **key}, sort_keys=True, default=str)
        self.folder = work / f"{kind}-{hashlib.sha256(self._key.encode()).hexdigest()[:16]}"
        self._checked: dict[Path, tuple[int, int, int]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made ({error.strerror}). Choose another folder.") from error

    def path(self, index: int) -> Path:
        """Where the result of one layer is, or will be."""
        return self.folder / f"layer-{index:05d}.safetensors"

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return one layer's tensors and report; None if there is no whole result made from these inputs."""
        described = self._described(index)
        if described is None:
            return None
        infos, report, sums = described
        tensors: dict[str, Tensor] = {}
        for name, info in infos.items():
            tensor = _read_checked(info, sums[name])
            if tensor is None:
                return None
            tensors[name] = tensor
        return tensors, report

    def has(self, index: int) -> bool:
        """True if there is a whole result of one layer made from these inputs; reads it once to make sure."""
        described = self._described(index)
        if described is None:
            return False
        path = self.path(index)
        state = path.stat()
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
        if self._checked.get(path) != stamp:
            infos, _, sums = described
            if any(_read_checked(info, sums[name]) is None for name, info in infos.items()):
                return False
            self._checked[path] = stamp
        return True

    def contents(self, index: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Return the names of one layer's tensors, and its report.

        Raises:
            OutputError: if the result is not there.
        """
        infos, report, _ = self._require(index)
        return tuple(infos), report

    def tensor(self, index: int, name: str) -> Tensor:
        """Read one tensor of one layer. Raises like `contents`."""
        infos, _, sums = self._require(index)
        tensor = _read_checked(infos[name], sums[name])
        if tensor is None:
            raise self._lost(index)
        return tensor

    def _require(self, index: int) -> _Described:
        described = self._described(index)
        if described is None:
            raise self._lost(index)
        return described

    def _lost(self, index: int) -> OutputError:
        return OutputError(f"{self.path(index)}: is gone or damaged. Run the conversion again.")

    def _described(self, index: int) -> _Described | None:
        """What a file holds; None if it is absent, its description is damaged, or it is of other inputs."""
        try:
            infos, metadata = read_header(self.path(index))
            sums, report = json.loads(metadata["sha256"]), metadata["report"]
            shapes = {name: (info.dtype, list(info.shape)) for name, info in infos.items()}
            whole = metadata["description"] == _description([self._key, index, report, sums, shapes])
            return (infos, json.loads(report), sums) if whole and metadata["key"] == self._key else None
        except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Write one layer's result; it appears whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        target = self.path(index)
        draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        sums = {name: _digest(tensor) for name, tensor in own.items()}
        shapes = {name: (dtype_name(tensor.dtype), list(tensor.shape)) for name, tensor in own.items()}
        described = json.dumps(report)
        metadata = {
            "key": self._key,
            "report": described,
            "sha256": json.dumps(sums),
            "description": _description([self._key, index, described, sums, shapes]),
        }
        try:
            save_file(own, draft, metadata=metadata)
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, target)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{target}: cannot be written ({error}).") from error
        finally:
            draft.unlink(missing_ok=True)


def _description(parts: list[Any]) -> str:
    """SHA-256 of everything in a file but the tensors' bytes, which have sums of their own, and of its number."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _read_checked(info: TensorInfo, digest: str) -> Tensor | None:
    """Read a tensor; None if its bytes are not those that were written, or cannot be read."""
    try:
        tensor = read_tensor(info)
    except (CheckpointError, OSError):
        return None
    return tensor if _digest(tensor) == digest else None
