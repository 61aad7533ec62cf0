"""Uptrain a converted folder as a step of a sweep, through `gqa uptrain` in a process of its own.

A process of its own frees all its memory when it ends, and a run that is killed takes no sweep with it; it goes on from
its last checkpoint when the sweep is run again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gqa_convert.errors import GQAConvertError

FOLDER = "uptrain"
_KEY = "uptrain.key"


def uptrain_point(model: Path, output: Path, *, config: Path, tokens: int, key: str) -> Path:
    """Uptrain `model` on `tokens` tokens as `config` says, and return the folder of the result.

    What an earlier run has left in `output` is gone on with if it was started under the same key, else removed: it is
    of another conversion or of other settings.

    Args:
        model: the converted folder.
        output: the uptraining's run folder.
        config: a run's YAML; its model, output and budget are replaced.
        tokens: budget.
        key: stands for everything that the result depends on.

    Raises:
        GQAConvertError: if the run fails; the message ends with its last words.
    """
    written = output.parent / _KEY
    if not written.is_file() or written.read_text(encoding="utf-8") != key:
        shutil.rmtree(output, ignore_errors=True)
        written.write_text(key, encoding="utf-8")
    changes = {
        "model": str(model.absolute()),
        "output": str(output.absolute()),
        "budget.steps": "null",
        "budget.alpha": "null",
        "budget.tokens": str(tokens),
    }
    command = [sys.executable, "-m", "gqa_convert.cli.main", "uptrain", str(config), "--json"]
    for key, value in changes.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GQAConvertError(f"uptraining ended with exit code {done.returncode}: {last.removeprefix('error: ')}")
    return output / "final"


def result_folder(point: Path) -> Path:
    """The folder to measure and publish of a point: the uptrained model if there is one, else the converted one."""
    trained = point / FOLDER / "final"
    return trained if trained.is_dir() else point / "model"
