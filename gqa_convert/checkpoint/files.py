"""Opens what lies in a folder that somebody else made: regular files only, and text of a bounded size.

A pipe under the name of a file would be waited on for ever, and a device read until memory ends; so every file is
opened without waiting and looked at before it is read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from gqa_convert.checkpoint.links import stays_inside
from gqa_convert.errors import CheckpointError

MAX_CONFIG_BYTES = 16 << 20
"""Longest config.json that is read; the largest known ones, with label tables, take 3 MB."""

MAX_RECORD_BYTES = 48 << 20
"""Longest index and gqa_convert.json that is read: both name every tensor, and 100,000 of them take about 10 MB."""

_MAX_DEPTH = 64


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; links are followed.

    Raises:
        CheckpointError: if it is a pipe, a device, a socket or a folder.
        OSError: if it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: is {_kind(mode)}, not a regular file. Put the file itself there.")
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def open_inside(folder: Path, path: Path) -> BinaryIO:
    """Open a regular file that must lie in `folder`, links resolved, or in the same hub cache entry.

    It is looked at before it is opened, and again after: a file swapped for a link at any moment is noticed.

    Raises:
        CheckpointError: if it leads elsewhere or is no regular file.
        OSError: if it cannot be opened.
    """
    if not stays_inside(folder, path):
        raise CheckpointError(f"{path}: a link that leaves the model folder. Refused: put the file itself there.")
    file = open_regular(path)
    real, seen = Path(os.path.realpath(path)), os.fstat(file.fileno())
    try:
        there = os.stat(real)
        same = (there.st_dev, there.st_ino) == (seen.st_dev, seen.st_ino)
    except OSError:
        same = False
    if not same or not stays_inside(folder, real):
        file.close()
        raise CheckpointError(f"{path}: a link that leaves the model folder. Refused: put the file itself there.")
    return file


def read_regular(path: Path, limit: int, *, inside: Path | None = None) -> bytes:
    """Read a whole regular file of at most `limit` bytes; with `inside`, one that lies in that folder.

    Raises:
        CheckpointError: if it is larger, no regular file, or lies elsewhere.
        OSError: if it cannot be read.
    """
    with open_regular(path) if inside is None else open_inside(inside, path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size:,} bytes are too many for such a file; {limit:,} are read at most.")
        parts, left = [], limit + 1
        while left > 0 and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise CheckpointError(f"{path}: grew beyond {limit:,} bytes while it was read.")
    return b"".join(parts)


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: if it cannot be read, or is anything else.
    """
    try:
        return parse_object(path, read_regular(path, limit).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text ({error.reason}).") from error


def parse_object(path: Path, text: str) -> dict[str, Any]:
    """Parse a JSON object, a byte-order mark before it allowed.

    Raises:
        CheckpointError: if it is anything else, or nested more than 64 levels deep.
    """
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:160]}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a JSON object.")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return value
    raise CheckpointError(f"{path}: is nested more than {_MAX_DEPTH} levels deep, as no such file is.")


def _children(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [each for each in inner if isinstance(each, (dict, list))]


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
    return next((name for test, name in kinds if test(mode)), "a device")
