"""The folder of a run: one run at a time may be at work in it."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gqa_convert.errors import OutputError
from gqa_convert.uptrain.engine import Engine

_LOCK = ".lock"
_PATIENCE = 10.0
"""Seconds that a network file system may take to show a new file to other machines."""


@contextmanager
def run_folder(folder: Path, engine: Engine) -> Iterator[None]:
    """Make the folder and hold it; the lock goes with the process, however it ends.

    Raises:
        OutputError: if it cannot be made, another run is at work in it, or a process does not see it: checkpoints that
            lie on several machines in parts could not be resumed from.
    """
    handle: int | None = None

    def take() -> str:
        nonlocal handle
        handle = _lock(folder)
        return secrets.token_hex(8)

    token = engine.from_main(take)
    mark = folder / f".run-{token}"
    try:
        if engine.processes > 1:
            _check_shared(mark, engine)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _check_shared(mark: Path, engine: Engine) -> None:
    """Make sure that every process sees what the main one writes."""
    if engine.is_main:
        mark.touch()
    engine.wait()
    seen = _appears(mark)
    missing = engine.sum_of(float(not seen))
    if engine.is_main:
        mark.unlink(missing_ok=True)
    if missing:
        raise OutputError(
            f"{mark.parent}: {missing:.0f} of {engine.processes} processes do not see what the first one writes there. "
            "Choose an output on storage that every machine sees."
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _lock(folder: Path) -> int:
    """Make the folder and its lock; returns the open file that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}). Choose another output.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(f"{folder}: another run is at work in it. Wait for it, or choose another output.") from error
    except OSError:
        pass  # some network file systems know no locks
    return handle
