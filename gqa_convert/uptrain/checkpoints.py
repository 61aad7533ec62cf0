"""Training checkpoints as folders: written beside their name, described last, renamed whole, checked before use.

A folder `step-00000100` counts only if its `complete.json` lists every file with size and SHA-256 and all of them
match. Older ones are removed only after a newer one is committed, and never below the number to keep.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.errors import CheckpointError, OutputError

MARKER = "complete.json"
STATE = "state.json"
_PREFIX = "step-"
_STAGE = ".saving-"
_READERS = 8


@dataclass(frozen=True)
class SavedCheckpoint:
    """A whole checkpoint: its folder, its step, and `state.json`."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Read `state.json`."""
        found: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return found


class CheckpointStore:
    """The checkpoints of a run, in one folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

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
        target = self._path(step)
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

    def newest(self, tell: Callable[[str], None] = lambda _: None) -> SavedCheckpoint | None:
        """Return the newest whole checkpoint, or None. Damaged ones are told of and passed over."""
        for step in sorted(self._steps(), reverse=True):
            problem = damage(self._path(step))
            if problem is None:
                return SavedCheckpoint(self._path(step), step)
            tell(f"{self._path(step)}: {problem}; trying an older checkpoint")
        return None

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints by their marker (not hashed), ascending."""
        return sorted(step for step in self._steps() if (self._path(step) / MARKER).is_file())

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def _steps(self) -> Iterator[int]:
        if self.folder.is_dir():
            for path in self.folder.glob(f"{_PREFIX}*"):
                if path.name.removeprefix(_PREFIX).isdigit():
                    yield int(path.name.removeprefix(_PREFIX))

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            # Without its marker it is no checkpoint any more, however far the removal gets.
            (self._path(step) / MARKER).unlink(missing_ok=True)
            shutil.rmtree(self._path(step), ignore_errors=True)


def open_checkpoint(folder: Path) -> SavedCheckpoint:
    """Open a checkpoint by its folder.

    Raises:
        CheckpointError: if it is not whole.
    """
    problem = damage(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}. Resume from another checkpoint, or use checkpoints.resume=auto.")
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return SavedCheckpoint(folder, int(marker["step"]))


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder; None if every byte is as it was written."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"has no {MARKER}, so it was never finished"
    except (OSError, ValueError, KeyError) as error:
        return f"its {MARKER} cannot be read ({error})"
    paths = [folder / name for name in files]
    for path, described in zip(paths, files.values(), strict=True):
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != described["bytes"]:
            return f"{path.name} has {path.stat().st_size} bytes, {described['bytes']} were written"
    for path, digest, described in zip(paths, _digests(paths), files.values(), strict=True):
        if digest != described["sha256"]:
            return f"{path.name} has changed since it was written"
    return None


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
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
