"""Moves bytes between files at the speed of the kernel, so that few weights pass through this process."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable

from gqa_convert.errors import CheckpointError

BLOCK = 4096
"""Pages and file-system blocks: the kernel moves whole ones if they lie at the same place within a block in both files.

It then also shares them instead of copying where the file system can (btrfs, XFS). If they do not, it copies byte by
byte, at less than half the speed of reads and writes through a buffer that fits the processor's cache.
"""

PIECE = 64 << 20
"""Bytes handed to the kernel at once: large enough to cost nothing, small enough for a smooth progress bar."""

_BUFFER = 1 << 20

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
    matched = (os.lseek(target, 0, os.SEEK_CUR) - offset) % BLOCK == 0
    copiers = _kernel_copiers() if matched else []
    end = offset + nbytes
    while offset < end:
        step = _step(offset, end)
        try:
            done = copiers[0](source, target, offset, step) if copiers else _read_write(source, target, offset, step)
        except OSError as error:
            if error.errno not in _UNSUPPORTED or not copiers:
                raise
            done = 0
        if done == 0:
            if not copiers:
                raise CheckpointError(f"the source file ended {end - offset:,} bytes early: it changed while copied.")
            del copiers[0]  # Some file systems (FUSE, procfs) answer 0 where they mean "not supported".
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


def reserve(target: int, nbytes: int) -> None:
    """Reserve the disk space of a file about to be written, where the file system can do so without writing.

    A full disk shows at once, and the blocks come in one run.

    Raises:
        OSError: if there is no room.
    """
    if not sys.platform.startswith("linux") or nbytes == 0:
        return
    # os.posix_fallocate would write every block itself where the file system cannot reserve.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if fallocate(target, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def _step(offset: int, end: int) -> int:
    """Cut so that all but the first and last pieces are whole blocks: file systems share nothing less."""
    step = min(end - offset, PIECE)
    if offset % BLOCK:
        return min(step, BLOCK - offset % BLOCK)
    return step - step % BLOCK if step > BLOCK else step


def _kernel_copiers() -> list[_Copier]:
    copiers: list[_Copier] = []
    if hasattr(os, "copy_file_range"):
        copiers.append(lambda source, target, offset, n: os.copy_file_range(source, target, n, offset))
    if hasattr(os, "sendfile"):
        copiers.append(lambda source, target, offset, n: os.sendfile(target, source, offset, n))
    return copiers


def _read_write(source: int, target: int, offset: int, nbytes: int) -> int:
    buffer = memoryview(bytearray(min(nbytes, _BUFFER)))
    done = 0
    while done < nbytes:
        got = os.preadv(source, [buffer[: nbytes - done]], offset + done)
        if got == 0:
            break
        wrote = 0
        while wrote < got:
            wrote += os.write(target, buffer[wrote:got])
        done += got
    return done
