"""What the contract asks of a family whose modelling code is shipped: strangers can load it, and eager is sdpa."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.proof.forward import logits

if TYPE_CHECKING:
    from torch import Tensor

_SCRIPT = Path(__file__).with_name("stranger.py")


def leave_inputs(folder: Path, inputs: dict[str, Tensor], expected: Tensor) -> None:
    """Put what a stranger is to run, and what must come of it, beside the weights."""
    import torch

    torch.save({**inputs, "logits": expected}, folder / "inputs.pt")


def meet_stranger(folders: Sequence[Path], cache: Path) -> list[dict[str, Any]]:
    """Load folders in a fresh process that cannot import this package; see `stranger.py` for what it finds.

    Raises:
        RuntimeError: with the last line of its errors, if the process fails.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(_SCRIPT), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"a process without gqa_convert cannot load it: {lines[-1][:300]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def eager_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's logits with eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return logits(model, inputs)
    finally:
        model.set_attn_implementation(before)
