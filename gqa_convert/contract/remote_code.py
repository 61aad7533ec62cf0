"""What the contract asks of a family whose modelling code is shipped: strangers can load it, and eager is sdpa."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.tiny.forward import logits

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5  # of logits, as a share of their scale
_SCRIPT = Path(__file__).with_name("standalone_load.py")


def leave_inputs(folder: Path, inputs: dict[str, Tensor], expected: Tensor) -> None:
    """Put what a stranger is to run, and what must come of it, beside the weights."""
    import torch

    torch.save({**inputs, "logits": expected}, folder / "inputs.pt")


def meet_strangers(folders: Sequence[Path], cache: Path) -> list[str]:
    """Load folders in a fresh process that cannot import this package, and return what is wrong with each, if anything.

    Args:
        folders: converted folders with their inputs (`leave_inputs`).
        cache: folder for transformers' copies of the modelling file.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(_SCRIPT), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    end = (done.stderr.strip().splitlines() or ["no result"])[-1][:300]
    return [_wrong(each) for each in answers] + [end] * (len(folders) - len(answers))


def _wrong(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"])
    if answer["module"] != "transformers_modules":
        return f"{answer['class']} came from {answer['module']}, not from the folder"
    if answer["troubles"]:
        return f"{answer['class']}: {answer['troubles']}"[:200]
    return (
        "" if answer["difference"] <= TOLERANCE else f"{answer['class']}: logits differ by {answer['difference']:.1e}"
    )


def eager_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's logits with eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return logits(model, inputs)
    finally:
        model.set_attn_implementation(before)
