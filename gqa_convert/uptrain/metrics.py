"""Numbers of a run, for machines: metrics.jsonl always, trackers through accelerate."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gqa_convert.errors import OutputError, UsageError
from gqa_convert.uptrain.config import LogSection

_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class MetricsFile:
    """`metrics.jsonl`: one object a line, each with its `step` and `kind` (`train`, `evaluation`, `event`).

    When a run resumes, what was logged after the checkpoint is dropped, so that every step is there once.

    Raises:
        OutputError: if something else has its name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: is no file, so nothing can be logged there. Move it away.")

    def rewind(self, step: int, *, finishing: bool = False) -> None:
        """Drop what will be written again: records after `step`, and of `step` itself that the run had gone on.

        Args:
            step: of the checkpoint that the run goes on from.
            finishing: nothing is left to train; the last evaluation, which comes after the last checkpoint, is made
                again.

        Raises:
            OSError: if the file cannot be written.
        """
        if not self._path.exists():
            return
        again = {"resumed", "save failed"}
        kept = [
            json.dumps(record)
            for record in read_metrics(self._path)
            if record["step"] < step
            or (
                record["step"] == step
                and record.get("event") not in again
                and not (finishing and record.get("kind") in ("evaluation", "tasks"))
            )
        ]
        stage = self._path.with_suffix(".tmp")
        stage.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(stage, self._path)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record. A full disk costs the record, not the run."""
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError:
            return


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, leaving out lines that are no whole record (a killed run's last one)."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def chosen_trackers(settings: LogSection) -> list[str]:
    """Names of the trackers to use.

    Raises:
        UsageError: if one that was asked for is not installed.
    """
    if settings.trackers == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []
    missing = [name for name in settings.trackers if find_spec(_MODULES[name]) is None]
    if missing:
        raise UsageError(f"log.trackers: {', '.join(missing)} not installed (pip install {' '.join(missing)}).")
    return list(settings.trackers)


def flat_config(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """A nested configuration with dotted names and plain values, as trackers want hyperparameters."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat
