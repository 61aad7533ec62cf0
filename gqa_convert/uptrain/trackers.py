"""TensorBoard, wandb and trackio through accelerate, each on its own: one that fails is dropped, the others go on.

A run keeps one identity over all its legs, so that what was stopped and resumed is one curve and not many.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = "trackers"
"""Where a run's output holds what trackers write."""
_IDENTITY = "run-id"


class Trackers:
    """The trackers of the main process.

    Args:
        names: of `log.trackers`, chosen and installed.
        output: the run's folder.
        project: of wandb and trackio; TensorBoard's folder is named after it.
        resumed: the step that the run goes on after; None if it starts.
        settings: hyperparameters, by dotted name.
        tell: told of trackers that fail.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        output: Path,
        project: str,
        resumed: int | None,
        settings: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._tell = tell
        self._working: dict[str, Any] = {}
        self._steps: dict[str, int] = {}
        if not names:
            return
        identity = run_identity(output / FOLDER, new=resumed is None)
        for name in names:
            arguments = tracker_arguments(name, output=output, project=project, identity=identity, resumed=resumed)
            self._try(name, partial(self._start, name, arguments, settings))

    def _start(self, name: str, arguments: dict[str, Any], settings: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[name](**arguments)
        tracker.start()
        self._working[name] = tracker
        tracker.store_init_configuration(settings)

    @property
    def working(self) -> list[str]:
        """Names of those that have not failed."""
        return list(self._working)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send numbers to every tracker that works."""
        for name, tracker in list(self._working.items()):
            self._try(name, partial(tracker.log, values, step=step))

    def close(self) -> None:
        """Let every tracker write what it still holds."""
        for name, tracker in list(self._working.items()):
            self._try(name, tracker.finish)
        self._working.clear()

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            # trackio talks on standard output, which `--json` keeps for the result.
            with redirect_stdout(sys.stderr):
                act()
        except Exception as error:  # a tracker's server that is away must not end a week's run
            self._working.pop(name, None)
            self._tell(f"tracker {name} switched off: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def run_identity(folder: Path, *, new: bool) -> str:
    """The identity of the run in this folder: eight hex digits, drawn when it starts, the same whenever it goes on."""
    path = folder / _IDENTITY
    if not new and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    identity = secrets.token_hex(4)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(identity + "\n", encoding="utf-8")
    except OSError:
        pass  # the numbers go to a run of their own then
    return identity


def tracker_arguments(name: str, *, output: Path, project: str, identity: str, resumed: int | None) -> dict[str, Any]:
    """What accelerate's tracker of that name is made with, so that a resumed run goes on in its own curve."""
    run = f"{output.name}-{identity}"
    if name == "wandb":
        # An identity that was used before is gone on with; a new one starts a run.
        return {"run_name": project, "name": run, "id": identity, "resume": "allow", "dir": str(output / FOLDER)}
    if name == "trackio":
        return {"run_name": project, "name": run, "resume": "allow"}
    # What a killed run wrote after its last checkpoint comes again; TensorBoard hides the first of the two.
    purge = {} if resumed is None else {"purge_step": resumed + 1}
    return {"run_name": project, "logging_dir": str(output / FOLDER), **purge}
