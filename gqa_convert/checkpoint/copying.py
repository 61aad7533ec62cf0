"""Copies byte ranges between files inside the kernel, so that no weight passes through this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from gqa_convert.errors import CheckpointError

PIECE = 64 << 20
"""Bytes handed to the kernel at once: large enough to cost nothing, small enough for a smooth progress bar."""
_BUFFER = 8 << 20

_Copier = Callable[[int, int, int, int], int]
"""(source fd, target fd, source offset, bytes) -> bytes copied to the target's present position."""

_UNSUPPORTED = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EPERM})


def copy_span(source: int, target: int, offset: int, nbytes: int, on_bytes: Callable[[int], None]) -> None:
    """Append `nbytes` of one open file, from `offset` on, at the present position of another.

    Uses `copy_file_range`, then `sendfile`, then plain reads and writes: whichever the platform and file system offer.

    Args:
        source: file descriptor to read.
        target: file descriptor to write.
        offset: first byte to copy.
        nbytes: bytes to copy.
        on_bytes: told the number of bytes after each piece (64 MiB at most).

    Raises:
        CheckpointError: if the source ends early.
        OSError: if reading or writing fails.
    """
    copiers = _copiers()
    end = offset + nbytes
    while offset < end:
        try:
            done = copiers[0](source, target, offset, min(end - offset, PIECE))
        except OSError as error:
            if error.errno not in _UNSUPPORTED or len(copiers) == 1:
                raise
            copiers = copiers[1:]
            continue
        if done == 0:
            if len(copiers) == 1:
                raise CheckpointError(f"the source file ended {end - offset:,} bytes early: it changed while copied.")
            copiers = copiers[1:]  # Some file systems (FUSE, procfs) answer 0 where they mean "not supported".
            continue
        offset += done
        on_bytes(done)


def write_all(target: int, data: memoryview, on_bytes: Callable[[int], None]) -> None:
    """Write all of `data` at the present position of an open file, telling `on_bytes` of each piece.

    Raises:
        OSError: if writing fails.
    """
    done = 0
    while done < len(data):
        wrote = os.write(target, data[done : done + PIECE])
        done += wrote
        on_bytes(wrote)


def _copiers() -> list[_Copier]:
    copiers: list[_Copier] = []
    if hasattr(os, "copy_file_range"):
        copiers.append(lambda source, target, offset, n: os.copy_file_range(source, target, n, offset))
    if hasattr(os, "sendfile"):
        copiers.append(lambda source, target, offset, n: os.sendfile(target, source, offset, n))
    copiers.append(_read_write)
    return copiers


def _read_write(source: int, target: int, offset: int, nbytes: int) -> int:
    data = os.pread(source, min(nbytes, _BUFFER), offset)
    view, done = memoryview(data), 0
    while done < len(data):
        done += os.write(target, view[done:])
    return done
