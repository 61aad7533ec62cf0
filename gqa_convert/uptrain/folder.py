"""The folder of a run: one run at a time may be at work in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gqa_convert.errors import OutputError
from gqa_convert.uptrain.engine import Engine


@contextmanager
def run_folder(folder: Path, engine: Engine) -> Iterator[None]:
    """Make the folder and hold it; the lock goes with the process, however it ends.

    Raises:
        OutputError: if it cannot be made, or another run is at work in it.
    """
    if not engine.is_main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}). Choose another output.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another run is at work in it. Wait for it, or choose another output."
            ) from error
        except OSError:
            pass  # some network file systems know no locks
        yield
    finally:
        os.close(handle)
