"""Flushes finished files to the disk while the next ones are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

STEP = 128 << 20
"""Bytes of a growing file after which what is there is sent on its way."""


class Flusher:
    """A thread that flushes files; leaving the `with` block waits for it and raises what the disk complained about.

    Use with `write_shard(..., sync=False)`, one `flush` a shard: the disk then works while the next shard is made.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Flusher:
        return self

    def flush(self, path: Path) -> None:
        """Begin to flush what a file holds by now."""
        self._pending.append(self._pool.submit(sync_path, path))

    def while_growing(self, path: Path) -> Callable[[int], None]:
        """Return what is to be told of the bytes written to a file, to begin flushing it before it is whole."""
        waiting = 0

        def tell(nbytes: int) -> None:
            nonlocal waiting
            waiting += nbytes
            if waiting >= STEP:
                waiting = 0
                self.flush(path)

        return tell

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the flushes.

        Raises:
            OSError: if one failed, unless the block itself has failed.
        """
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


def sync_path(path: Path) -> None:
    """Flush a file or folder to the disk.

    Raises:
        OSError: if the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush folders, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself.

    Raises:
        OSError: if the disk refuses.
    """
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root) / name)
        sync_path(Path(root))
