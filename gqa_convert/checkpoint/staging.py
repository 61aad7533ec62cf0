"""An output folder that appears whole or not at all.

Everything is written into a sibling folder `.<name>.tmp-<pid>-<random>` and renamed into place at the end. The folder
holds a locked file, so that a later run can tell one that is in use from one that a killed run left behind: the kernel
drops the lock with the process, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gqa_convert.checkpoint.flushing import sync_path, sync_tree
from gqa_convert.checkpoint.reader import CONFIG, PROVENANCE
from gqa_convert.errors import CheckpointError, OutputError

_LOCK = ".lock"

_ADVICE = {
    errno.ENOSPC: "the disk is full. Free some space, or choose another --out",
    errno.EDQUOT: "your disk quota is used up. Free some space, or choose another --out",
    errno.EACCES: "no permission to write there. Choose another --out",
    errno.EPERM: "not permitted there. Choose another --out",
    errno.EROFS: "the file system is read-only. Choose another --out",
    errno.EFBIG: "the file system cannot hold files that large. Choose another --out",
    errno.EIO: "the disk reported an input/output error. Choose another --out",
}


@contextmanager
def staged_output(target: Path, *, force: bool, source: Path, needed_bytes: int, sync: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an exception, it becomes `target`.

    With `force`, an existing folder is replaced if it is a checkpoint (it holds config.json or gqa_convert.json) or is
    empty; anything else is never replaced. An exception of any kind removes what was written and leaves `target` as it
    was.

    Args:
        target: folder to make. Its parent must exist.
        force: replace an existing checkpoint.
        source: the folder being read, which `target` may not be, hold, or lie in.
        needed_bytes: free space to require before anything is written.
        sync: flush everything to the disk before the rename, so that even a power cut cannot leave half an output.

    Yields:
        The folder to write into.

    Raises:
        OutputError: if the target may not be written, space is lacking, or the disk refuses while writing.
        CheckpointError: if a file of the source may not be read.
    """
    target = Path(os.path.abspath(target))
    with _clear_errors(target, source):
        _clean_up(target)
        check_output(target, force=force, source=source, needed_bytes=needed_bytes)
        stage, lock = _make_stage(target)
        try:
            yield stage
            if sync:
                sync_tree(stage)
            _publish(stage, target, force)
            (target / _LOCK).unlink()
        finally:
            # After a successful rename there is nothing left under this name.
            shutil.rmtree(stage, ignore_errors=True)
            os.close(lock)


def check_output(target: Path, *, force: bool, source: Path, needed_bytes: int) -> None:
    """Refuse a target that `staged_output` would refuse, without writing anything.

    Raises:
        OutputError: as for `staged_output`.
    """
    _check_apart(target, source)
    parent = target.parent
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such folder, so {target.name} cannot be made in it. Make it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: no permission to write there. Choose another --out.")
    if target.is_symlink() or target.exists():
        _check_replaceable(target, force)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{parent}: {needed_bytes:,} bytes are needed, {free:,} are free. Free some space, or choose another --out."
        )


def _check_apart(target: Path, source: Path) -> None:
    here, there = target.resolve(), source.resolve()
    if here == there:
        raise OutputError(f"{target}: is the source itself, which is never written to. Choose another --out.")
    if here.is_relative_to(there):
        raise OutputError(f"{target}: lies inside the source, which is never written to. Choose another --out.")
    if there.is_relative_to(here):
        raise OutputError(f"{target}: holds the source {source}. Choose another --out.")


def _check_replaceable(target: Path, force: bool) -> None:
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target}: exists and is not a folder. Choose another --out.")
    empty = not any(target.iterdir())
    known = (target / PROVENANCE).is_file() or (target / CONFIG).is_file()
    if not (empty or known):
        raise OutputError(
            f"{target}: exists and is not a model folder (no config.json in it), so it is never replaced. "
            "Choose another --out."
        )
    if not force:
        raise OutputError(f"{target}: exists. Use --force to replace it, or choose another --out.")


def _make_stage(target: Path) -> tuple[Path, int]:
    """Make the temporary folder with its lock file; the lock is held until the descriptor is closed."""
    while True:
        stage = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        stage.mkdir()
        lock = -1
        try:
            lock = os.open(stage / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            with suppress(OSError):  # Without locks (some network file systems) the pid alone must do.
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.stat(stage / _LOCK)
        except FileNotFoundError:
            # Another run took the folder for a stale one before it was locked.
            if lock >= 0:
                os.close(lock)
            continue
        return stage, lock


def _clean_up(target: Path) -> None:
    """Remove what killed runs towards the same target left; put back an old target that one had just moved aside."""
    with suppress(OSError):
        for folder in list(target.parent.iterdir()):
            kind, _, rest = folder.name.removeprefix(f".{target.name}.").partition("-")
            pid = rest.partition("-")[0]
            if not folder.name.startswith(f".{target.name}.") or not pid.isdigit() or not folder.is_dir():
                continue
            if kind == "tmp":
                _remove_if_stale(folder, int(pid))
            elif kind == "old" and not _alive(int(pid)):
                if target.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    os.rename(folder, target)


def _remove_if_stale(folder: Path, pid: int) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        # Its owner has been killed, or is at work, just before the lock is made.
        if not _alive(pid):
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and not _alive(pid):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _publish(stage: Path, target: Path, force: bool) -> None:
    """Rename the finished folder into place; an old one is moved aside first and put back if that fails."""
    if not target.exists():
        os.rename(stage, target)
        sync_path(target.parent)
        return
    _check_replaceable(target, force)
    aside = target.with_name(f".{target.name}.old-{stage.name.removeprefix(f'.{target.name}.tmp-')}")
    try:
        os.rename(target, aside)
        os.rename(stage, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    sync_path(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _clear_errors(target: Path, source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else target
        if os.path.abspath(where).startswith(os.path.abspath(source) + os.sep):
            raise CheckpointError(f"{where}: cannot be read ({error.strerror}).") from error
        raise OutputError(f"{where}: {advice}. Nothing was left behind.") from error
