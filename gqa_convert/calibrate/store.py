"""Results of finished layers on disk, so that an interrupted run goes on where it stopped.

One safetensors file a layer, written under another name and renamed, in a folder named after a hash of everything that
the result depends on. A file that is damaged, or was made from anything else, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.provenance import source_identity
from gqa_convert.checkpoint.reader import read_tensor
from gqa_convert.checkpoint.safetensors_file import TensorInfo, read_header
from gqa_convert.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.checkpoint.reader import Checkpoint

_FORMAT = 1


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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made ({error.strerror}). Choose another folder.") from error

    def path(self, index: int) -> Path:
        """Where the result of one layer is, or will be."""
        return self.folder / f"layer-{index:05d}.safetensors"

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return one layer's tensors and report; None if there is no whole result made from these inputs."""
        found = self._header(index)
        if found is None:
            return None
        infos, report = found
        return {name: read_tensor(info) for name, info in infos.items()}, report

    def has(self, index: int) -> bool:
        """True if there is a whole result of one layer made from these inputs."""
        return self._header(index) is not None

    def contents(self, index: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Return the names of one layer's tensors, and its report.

        Raises:
            OutputError: if the result is not there.
        """
        infos, report = self._require(index)
        return tuple(infos), report

    def tensor(self, index: int, name: str) -> Tensor:
        """Read one tensor of one layer. Raises like `contents`."""
        return read_tensor(self._require(index)[0][name])

    def _require(self, index: int) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        found = self._header(index)
        if found is None:
            raise OutputError(f"{self.path(index)}: is gone or damaged. Run the conversion again.")
        return found

    def _header(self, index: int) -> tuple[dict[str, TensorInfo], dict[str, Any]] | None:
        try:
            infos, metadata = read_header(self.path(index))
            return (infos, json.loads(metadata["report"])) if metadata.get("key") == self._key else None
        except (CheckpointError, ValueError, KeyError):
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
        try:
            save_file(own, draft, metadata={"key": self._key, "report": json.dumps(report)})
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, target)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{target}: cannot be written ({error}).") from error
        finally:
            draft.unlink(missing_ok=True)
