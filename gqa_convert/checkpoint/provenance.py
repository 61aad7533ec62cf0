"""`gqa_convert.json`: where a converted checkpoint came from and how it was made."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.links import hub_snapshot
from gqa_convert.checkpoint.ownership import TOOL, written_files
from gqa_convert.checkpoint.reader import CONFIG, PROVENANCE, Checkpoint, read_record
from gqa_convert.checkpoint.writer import write_text
from gqa_convert.errors import CheckpointError

__all__ = ["PROVENANCE", "read_provenance", "source_identity", "write_provenance"]

_CHUNK = 8 << 20


def source_identity(checkpoint: Checkpoint, hash_files: bool = False) -> dict[str, Any]:
    """Describe a checkpoint so that it can be recognised later. Names no path above its own folder.

    Args:
        checkpoint: the source.
        hash_files: hash the whole weight files too (reads every byte).

    Returns:
        JSON-ready: `name`, `format`, `config_sha256`, `files` (each with `name`, `bytes`, `header_sha256`, on request
        `sha256`, and in a hub cache `blob`), and in a hub cache `hub` with `repo_id` and `revision`.

    Raises:
        CheckpointError: if a file can no longer be read.
    """
    folder = checkpoint.folder.resolve()
    snapshot = hub_snapshot(folder)
    repo = snapshot[0] if snapshot else None
    identity: dict[str, Any] = {"name": folder.name, "format": checkpoint.format}
    if snapshot is not None:
        identity["hub"] = {"repo_id": _repo_id(snapshot[0]), "revision": snapshot[1]}
        identity["name"] = _repo_id(snapshot[0])
    try:
        identity["config_sha256"] = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
        identity["files"] = [_file_identity(file, repo, hash_files) for file in checkpoint.weight_files]
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:  # zipfile knows many ways to complain
        raise CheckpointError(f"{folder}: can no longer be read ({error}).") from error
    return identity


def write_provenance(path: Path, data: dict[str, Any]) -> None:
    """Write provenance as indented JSON and flush it to the disk.

    It goes into the folder last: the record lists every other file that is there by then, by which the folder can be
    recognised as ours later.

    Raises:
        OSError: if writing fails.
    """
    record = {
        "format": 1,
        "tool": {"name": TOOL, "version": version(TOOL)},
        **data,
        "files": written_files(path.parent),
    }
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _file_identity(file: Path, repo: Path | None, hash_file: bool) -> dict[str, Any]:
    identity: dict[str, Any] = {"name": file.name, "bytes": file.stat().st_size, "header_sha256": _header_hash(file)}
    if repo is not None and file.is_symlink():
        # The hub names a large file's blob by the SHA-256 of its contents.
        identity["blob"] = file.resolve().name
    if hash_file:
        identity["sha256"] = file_sha256(file)
    return identity


def _repo_id(repo: Path) -> str:
    return repo.name.removeprefix("models--").replace("--", "/")


def _header_hash(file: Path) -> str:
    """Hash what describes the tensors: a safetensors header, or a pickle with its archive's table of checksums."""
    if file.suffix == ".safetensors":
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            return _hash(iter([prefix, stream.read(int.from_bytes(prefix, "little"))]))
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            table = [f"{entry.filename} {entry.file_size} {entry.CRC:08x}\n".encode() for entry in entries]
            pickles = [archive.read(entry) for entry in entries if entry.filename.endswith("data.pkl")]
            return _hash(iter(table + pickles))
    with open(file, "rb") as stream:
        return _hash(iter([stream.read(_CHUNK)]))


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hex digits (`hashlib.file_digest` came with Python 3.11)."""
    return _hash(_chunks(file))


def _chunks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _hash(chunks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return a converted folder's `gqa_convert.json`, empty if it has none.

    Raises:
        CheckpointError: if it is damaged.
    """
    return read_record(folder) or {}


def versions(*names: str) -> dict[str, str]:
    """Return the installed versions of packages, as records and results state them; by default of what computes."""
    return {name: version(name) for name in names or ("gqa-convert", "torch", "transformers")}
