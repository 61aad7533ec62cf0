"""Training checkpoints as folders: written beside their name, described last, renamed whole, checked before use.

A folder `step-00000100` counts only if its `complete.json` lists every file with size and SHA-256 and all of them
match. Older ones are removed only after a newer one is committed, and never below the number to keep.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gqa_convert.checkpoint.provenance import file_sha256
from gqa_convert.errors import CheckpointError, OutputError

MARKER = "complete.json"
STATE = "state.json"
_PREFIX = "step-"
_STAGE = ".saving-"
_NUMBER = re.compile(r"[0-9]{8,18}")
_READERS = 8
_LONGEST_MARKER, _LONGEST_STATE = 1 << 26, 1 << 31


@dataclass(frozen=True)
class SavedCheckpoint:
    """A whole checkpoint: its folder, its step, and `state.json`."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Read `state.json`.

        Raises:
            CheckpointError: if it is not what a save writes.
        """
        try:
            return _read_state(self.folder)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.folder / STATE}: cannot be used ({_short(error)}).") from error


class CheckpointStore:
    """The checkpoints of a run, in one folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self.pinned: int | None = None
        """Step of a checkpoint that is kept however old it is."""

    def stage(self, step: int) -> Path:
        """Return the folder in which the checkpoint of `step` is written before it is committed."""
        return self.folder / f"{_STAGE}{step:08d}"

    def begin(self, step: int) -> Path:
        """Make an empty stage. Called by one process.

        Raises:
            OSError: if it cannot be made.
        """
        stage = self.stage(step)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        return stage

    def commit(self, step: int, state: dict[str, Any]) -> SavedCheckpoint:
        """Describe the stage, rename it, then prune older checkpoints. Called by one process, when all have written.

        Raises:
            OSError: if writing fails; the stage is then no checkpoint.
        """
        stage = self.stage(step)
        _write(stage / STATE, json.dumps(state, indent=2))
        paths = _files(stage)
        files = {
            str(path.relative_to(stage)): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, _digests(paths), strict=True)
        }
        for path in paths:
            _sync(path)
        _write(stage / MARKER, json.dumps({"step": step, "files": files}, indent=2))
        _sync(stage)
        target = self.path(step)
        if target.exists():  # a damaged one, or it would have been resumed from
            shutil.rmtree(target)
        os.rename(stage, target)
        _sync(self.folder)
        self._prune()
        return SavedCheckpoint(target, step)

    def abandon(self, step: int) -> None:
        """Remove what a failed save has written."""
        shutil.rmtree(self.stage(step), ignore_errors=True)

    def clean(self) -> None:
        """Remove stages that a killed run left behind."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{_STAGE}*"):
                shutil.rmtree(path, ignore_errors=True)

    def newest(
        self, tell: Callable[[str], None] = lambda _: None, *, fault: Callable[[Path], str | None] = lambda _: None
    ) -> SavedCheckpoint | None:
        """Return the newest whole checkpoint, or None. Others are told of and passed over.

        Args:
            tell: told of checkpoints that are passed over.
            fault: says what keeps an undamaged folder from being used; None if nothing does.
        """
        for step in sorted(self._steps(), reverse=True):
            problem = damage(self.path(step), step) or fault(self.path(step))
            if problem is None:
                return SavedCheckpoint(self.path(step), step)
            tell(f"{self.path(step)}: {problem}; trying an older checkpoint")
        return None

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints by their marker (not hashed), ascending."""
        return sorted(step for step in self._steps() if (self.path(step) / MARKER).is_file())

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def _steps(self) -> Iterator[int]:
        if self.folder.is_dir():
            for path in self.folder.glob(f"{_PREFIX}*"):
                if _NUMBER.fullmatch(path.name.removeprefix(_PREFIX)) and path.is_dir():
                    yield int(path.name.removeprefix(_PREFIX))

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            if step == self.pinned:
                continue
            # Without its marker it is no checkpoint any more, however far the removal gets.
            (self.path(step) / MARKER).unlink(missing_ok=True)
            shutil.rmtree(self.path(step), ignore_errors=True)


def open_checkpoint(folder: Path, *, fault: Callable[[Path], str | None] = lambda _: None) -> SavedCheckpoint:
    """Open a checkpoint by its folder. For `fault` see `CheckpointStore.newest`.

    Raises:
        CheckpointError: if it is not whole, or cannot be used.
    """
    problem = damage(folder) or fault(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}. Resume from another checkpoint, or use checkpoints.resume=auto.")
    return SavedCheckpoint(folder, int(_read_state(folder)["step"]))


def damage(folder: Path, step: int | None = None) -> str | None:
    """Say what is wrong with a checkpoint folder; None if every byte is as it was written.

    Args:
        folder: the checkpoint.
        step: the one that it must be of; None for any.
    """
    if not folder.is_dir():
        return f"has no {MARKER}, so it was never finished"
    try:
        files = _read_marker(folder)
    except FileNotFoundError:
        return f"has no {MARKER}, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MARKER} cannot be read ({_short(error)})"
    for path, (size, _) in files.items():
        if path.is_symlink() or not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, {size} were written"
    try:
        digests = _digests(list(files))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    for (path, (_, written)), digest in zip(files.items(), digests, strict=True):
        if digest != written:
            return f"{path.name} has changed since it was written"
    try:
        state = _read_state(folder)
    except (OSError, ValueError, RecursionError) as error:
        return f"its {STATE} cannot be used ({_short(error)})"
    if step is not None and state["step"] != step:
        return f"is of step {state['step']}, not of the one in its name"
    return None


def _read_marker(folder: Path) -> dict[Path, tuple[int, str]]:
    """The files of a checkpoint with size and SHA-256; a marker of any other form raises one of several errors."""
    described = _read_json(folder / MARKER, _LONGEST_MARKER)["files"]
    files: dict[Path, tuple[int, str]] = {}
    for name, entry in described.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\0" in name:
            raise ValueError(f"it names a file outside of its folder, {name[:80]!r}")
        files[folder / relative] = (int(entry["bytes"]), str(entry["sha256"]))
    if folder / STATE not in files:
        raise ValueError(f"it does not list {STATE}")
    return files


def _read_state(folder: Path) -> dict[str, Any]:
    state = _read_json(folder / STATE, _LONGEST_STATE)
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"its step is {str(step)[:40]!r}")
    return state


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    if not path.is_file() and path.exists():
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is longer than {limit:,} bytes")
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def disk_problem(error: OSError, folder: Path) -> OutputError:
    """The error to stop with when a save failed too often."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"{error.strerror or error}"
    return OutputError(
        f"{folder}: a checkpoint could not be saved ({what}). Earlier checkpoints are untouched. Free some space and "
        "run again to go on from the newest one."
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests(paths: list[Path]) -> list[str]:
    """SHA-256 of each file, several at a time: every device waits for it, and a sharded checkpoint has many files."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="digests") as pool:
        return list(pool.map(file_sha256, paths))


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
