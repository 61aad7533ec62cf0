"""Which folders may be replaced: those that we wrote, by their own record, and that hold nothing else.

`gqa_convert.json` lists every file of the folder it was written into, with its size and, to 16 MiB, its hash. A folder
is ours if its record is valid and it holds nothing that the record does not list. Records of before the list was kept
allow files of the kinds that a conversion writes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from gqa_convert.checkpoint.reader import PROVENANCE, read_record
from gqa_convert.errors import CheckpointError, OutputError

LOCK = ".lock"
"""Held in a folder that is being written."""

TOOL = "gqa-convert"

CARD, SOURCE_CARD = "README.md", "README-source.md"
"""The card that a conversion writes, and the name under which the original's goes along."""

_MARK = "<!-- written by gqa-convert; sha256 of what stands above: {} -->\n"

_UNLISTED = (PROVENANCE, LOCK)
_HASHED_BYTES = 16 << 20
_MAX_CARD_BYTES = 1 << 20
_KINDS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "modeling_gqa.py",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "*processor_config.json",
    "README*.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def written_files(folder: Path) -> dict[str, dict[str, Any]]:
    """List what a folder holds for its record: by path relative to it its `bytes` and, to 16 MiB, its `sha256`; sorted.

    Raises:
        OSError: if a file cannot be read.
    """
    entries = sorted(_entries(folder), key=lambda entry: entry[0])
    return {
        relative: _described(folder / relative, status) for relative, status in entries if relative not in _UNLISTED
    }


def _described(file: Path, status: os.stat_result) -> dict[str, Any]:
    described: dict[str, Any] = {"bytes": status.st_size}
    if status.st_size <= _HASHED_BYTES:
        described["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return described


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that is not provably ours; an empty one is anybody's.

    Raises:
        OutputError: naming the first thing that speaks against it.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError(f"{folder}: exists and is not a folder. Choose another --out.")
    _check_place(folder)
    if not any(os.scandir(folder)):
        return
    record = _own_record(folder)
    listed = record.get("files")
    for relative, status in _entries(folder):
        if relative in _UNLISTED:
            continue
        if not stat.S_ISREG(status.st_mode):
            _refuse(folder, f"{relative} in it was not written by a conversion")
        if relative == CARD and _is_our_card(folder / relative):
            continue
        if not isinstance(listed, dict):
            if not any(fnmatchcase(relative, kind) for kind in _KINDS):
                _refuse(folder, f"{relative} in it is of no kind that a conversion writes")
        elif relative not in listed:
            _refuse(folder, f"{relative} in it was not written by a conversion")
        elif listed[relative] != _described(folder / relative, status):
            _refuse(folder, f"{relative} in it was changed since it was written")


def _refuse(folder: Path, why: str) -> NoReturn:
    raise OutputError(f"{folder}: exists, and {why}, so it is never replaced. Choose another --out.")


def _check_place(folder: Path) -> None:
    real = os.path.realpath(folder)
    for name, place in (("the home directory", os.path.expanduser("~")), ("the working directory", os.curdir)):
        place = os.path.realpath(place)
        if place == real or place.startswith(real.rstrip(os.sep) + os.sep):
            raise OutputError(f"{folder}: is {'or holds ' if place != real else ''}{name}. Choose another --out.")
    if os.path.ismount(real):
        raise OutputError(f"{folder}: is a mount point, which cannot be replaced. Choose another --out.")


def _own_record(folder: Path) -> dict[str, Any]:
    """The folder's record, if it is a valid one of ours."""
    try:
        record = read_record(folder)
    except CheckpointError as error:
        raise OutputError(
            f"{folder}: exists, and its {PROVENANCE} is no record of ours. Choose another --out."
        ) from error
    if record is None:
        _refuse(folder, f"it has no {PROVENANCE} that says a conversion wrote it")
    tool = record.get("tool")
    named = isinstance(tool, dict) and tool.get("name") == TOOL
    if not named or not any(isinstance(record.get(part), dict) for part in ("conversion", "uptraining")):
        _refuse(folder, f"its {PROVENANCE} is no record of ours")
    return record


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder but folders themselves, links not followed: relative path with `/`, and its status.

    A folder with nothing in it counts too: no conversion makes one.
    """
    for root, folders, files in os.walk(folder):
        base = PurePosixPath(Path(root).relative_to(folder).as_posix())
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in (*files, *links):
            with suppress(FileNotFoundError):  # the lock, which another run has just removed
                yield str(base / name), os.lstat(os.path.join(root, name))
        if not folders and not files and root != os.fspath(folder):
            yield str(base), os.lstat(root)


def sign_card(text: str) -> str:
    """A card with our mark as its last line: the hash of what stands above it, so that an edited card is not ours."""
    text = text.rstrip("\n") + "\n\n"
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def is_signed(content: bytes) -> bool:
    """Whether a card is as we wrote it, by the mark that it ends with."""
    above, newline, _ = content.rstrip(b"\n").rpartition(b"\n")
    return content == above + newline + _MARK.format(hashlib.sha256(above + newline).hexdigest()).encode()


def _is_our_card(file: Path) -> bool:
    try:
        with open(file, "rb") as card:
            return is_signed(card.read(_MAX_CARD_BYTES))
    except OSError:
        return False
