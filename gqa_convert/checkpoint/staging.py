"""An output folder that appears whole or not at all.

Everything is written into a sibling folder `.<name>.tmp-<pid>-<random>` and renamed into place at the end. The folder
holds a locked file, so that a later run can tell one that is in use from one that a killed run left behind: the kernel
drops the lock with the process, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gqa_convert.checkpoint.flushing import sync_path, sync_tree
from gqa_convert.checkpoint.ownership import LOCK, check_replaceable
from gqa_convert.errors import CheckpointError, OutputError

_LONGEST_NAME = 255
_LONGEST_PREFIX = 200
_PATIENCE = 10.0
"""Seconds to wait for another run that is just renaming its output into place."""
_TRIES = 20

_ADVICE = {
    errno.ENOSPC: "the disk is full. Free some space, or choose another --out",
    errno.EDQUOT: "your disk quota is used up. Free some space, or choose another --out",
    errno.EACCES: "no permission to write there. Choose another --out",
    errno.EPERM: "not permitted there. Choose another --out",
    errno.EROFS: "the file system is read-only. Choose another --out",
    errno.EFBIG: "the file system cannot hold files that large. Choose another --out",
    errno.EIO: "the disk reported an input/output error. Choose another --out",
    errno.ELOOP: "its path runs in a circle of symbolic links. Choose another --out",
    errno.ENAMETOOLONG: "the name is too long for the file system. Choose a shorter --out",
    errno.EBUSY: "is in use, as a mount point is. Choose another --out",
    errno.EXDEV: "lies across two file systems, so it cannot be put in place whole. Choose another --out",
    errno.ENOTEMPTY: "something else has just been written there. Choose another --out",
    errno.ESTALE: "the network file system lost it while it was written. Try again, or choose another --out",
    errno.ENOTDIR: "is not a folder. Choose another --out",
    errno.EMFILE: "this process may open no more files. Raise `ulimit -n`",
    errno.ENFILE: "the system may open no more files. Close some programs",
    errno.EILSEQ: "the file system does not allow such a name. Choose another --out",
}


@contextmanager
def staged_output(target: Path, *, force: bool, source: Path, needed_bytes: int, sync: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an exception, it becomes `target`.

    With `force`, an existing folder is replaced if it is an earlier output (see `ownership`) or is empty; anything else
    is never replaced. An exception of any kind removes what was written and leaves `target` as it was.

    Args:
        target: folder to make. Folders above it that are missing are made, and removed again if nothing comes of it.
        force: replace an earlier output.
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
        with _parents(target):
            stage, lock = _make_stage(target)
            try:
                yield stage
                if sync:
                    sync_tree(stage)
                _publish(stage, target, force)
            finally:
                # After a successful rename there is nothing left under this name.
                shutil.rmtree(stage, ignore_errors=True)
                os.close(lock)


def check_output(target: Path, *, force: bool, source: Path, needed_bytes: int) -> None:
    """Refuse a target that `staged_output` would refuse, without writing anything.

    Raises:
        OutputError: as for `staged_output`.
    """
    target = Path(os.path.abspath(target))
    with _clear_errors(target, source):
        _check_output(target, force, source, needed_bytes)


def check_apart(path: Path, source: Path, option: str = "--out") -> None:
    """Refuse a folder to write that is the source, lies in it, or holds it.

    Raises:
        OutputError: if so.
    """
    here, there = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    if here == there:
        raise OutputError(f"{path}: is the source itself, which is never written to. Choose another {option}.")
    if here.is_relative_to(there):
        raise OutputError(f"{path}: lies inside the source, which is never written to. Choose another {option}.")
    if option == "--out" and there.is_relative_to(here):
        raise OutputError(f"{path}: holds the source {source}. Choose another --out.")


def sibling(target: Path, kind: str) -> Path:
    """A hidden name beside `target` that tells whose it is; cut where the file system would not take it whole.

    Args:
        target: the output.
        kind: what the sibling is, e.g. `work`.
    """
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_PREFIX:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = os.fsdecode(os.fsencode(name)[: _LONGEST_PREFIX - len(digest) - 1]) + "-" + digest
    return target.with_name(f".{name}.{kind}")


def _check_output(target: Path, force: bool, source: Path, needed_bytes: int) -> None:
    check_apart(target, source)
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise OutputError(
            f"{target.parent}: a name of {len(target.name)} characters is too long. Choose a shorter --out."
        )
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise OutputError(f"{parent}: is not a folder, so {target.name} cannot be made below it. Choose another --out.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: no permission to write there. Choose another --out.")
    with _locked(parent):  # another run may be renaming its output into place
        if os.path.lexists(target):
            _check_target(target, force)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{parent}: {needed_bytes:,} bytes are needed, {free:,} are free. Free some space, or choose another --out."
        )


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the missing folders above `target`; those of them that are empty in the end are removed again."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:  # the innermost first
            with suppress(OSError):
                folder.rmdir()


def _check_target(target: Path, force: bool) -> None:
    check_replaceable(target)
    if not force:
        raise OutputError(f"{target}: exists. Use --force to replace it, or choose another --out.")


def _make_stage(target: Path) -> tuple[Path, int]:
    """Make the temporary folder with its lock file; the lock is held until the descriptor is closed."""
    while True:
        stage = sibling(target, f"tmp-{os.getpid()}-{secrets.token_hex(4)}")
        stage.mkdir()
        lock = -1
        try:
            lock = os.open(stage / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            with suppress(OSError):  # Without locks (some network file systems) the pid alone must do.
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.stat(stage / LOCK)
        except FileNotFoundError:
            # Another run took the folder for a stale one before it was locked.
            if lock >= 0:
                os.close(lock)
            continue
        return stage, lock


def _clean_up(target: Path) -> None:
    """Remove what killed runs towards the same target left; put back an old target that one had just moved aside."""
    ours = re.compile(re.escape(str(sibling(target, ""))) + r"(tmp|old)-(\d+)-[0-9a-f]{8}")
    with suppress(OSError):
        for folder in list(target.parent.iterdir()):
            match = ours.fullmatch(str(folder))
            if match is None or folder.is_symlink() or not folder.is_dir():
                continue
            if match[1] == "tmp":
                _remove_if_stale(folder, int(match[2]))
            elif not _alive(int(match[2])):
                _settle_old(folder, target)


def _settle_old(folder: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.rename(folder, target)
        return
    with suppress(OutputError):
        check_replaceable(folder)
        _discard(folder, target)


def _discard(old: Path, target: Path) -> None:
    """Remove an old target under the name of a temporary folder: half removed, it could not be told for ours."""
    stale = sibling(target, old.name.rpartition(".")[2].replace("old-", "tmp-", 1))
    os.rename(old, stale)
    shutil.rmtree(stale, ignore_errors=True)


def _remove_if_stale(folder: Path, pid: int) -> None:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
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
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _publish(stage: Path, target: Path, force: bool) -> None:
    """Rename the finished folder into place; an old one is moved aside first and put back if that fails.

    Several runs may do so at once: the folder above is locked meanwhile, and what one of them finds changed all the
    same (by a run on another machine, where locks do not reach) it looks at again.
    """
    inside = os.open(stage, os.O_RDONLY)
    try:
        for attempt in range(_TRIES):
            try:
                with _locked(target.parent):
                    aside = _rename_in(stage, target, force)
                    with suppress(FileNotFoundError):
                        os.unlink(LOCK, dir_fd=inside)
                break
            except OSError as error:
                moved = error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) and stage.is_dir()
                if not moved or attempt + 1 == _TRIES:
                    raise
    finally:
        os.close(inside)
    sync_path(target.parent)
    if aside is not None:
        _discard(aside, target)


def _rename_in(stage: Path, target: Path, force: bool) -> Path | None:
    """Rename `stage` to `target`; returns where what was there lies now."""
    if not os.path.lexists(target):
        os.rename(stage, target)
        return None
    _check_target(target, force)
    number = stage.name.rpartition(".tmp-")[2]
    aside = sibling(target, f"old-{number}")
    try:
        os.rename(target, aside)
        _check_again(aside, target)
        os.rename(stage, target)
    except BaseException:
        if aside.exists() and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    return aside


def _check_again(aside: Path, target: Path) -> None:
    """Look once more at what was moved aside: nobody can add to it under its old name now."""
    try:
        check_replaceable(aside)
    except OutputError as error:
        raise OutputError(f"{target}: was changed meanwhile, so it is not replaced. Choose another --out.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; where it cannot be had (some network file systems), go on without."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or time.monotonic() > deadline:
                    break
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


@contextmanager
def _clear_errors(target: Path, source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, (str, bytes))
        where = Path(os.path.abspath(os.fsdecode(error.filename))) if named else target
        advice = _ADVICE.get(error.errno or 0)
        if advice is None and not (named and error.errno and where.is_relative_to(target.parent)):
            raise
        if where.is_relative_to(os.path.abspath(source)):
            raise CheckpointError(f"{where}: cannot be read ({error.strerror}).") from error
        advice = advice or f"cannot be written ({error.strerror}). Choose another --out"
        raise OutputError(f"{where}: {advice}. Nothing was left behind.") from error
