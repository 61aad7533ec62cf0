"""Client check: mlx-lm, on the CPU."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import main
from mlx_lm.utils import load_model


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


if __name__ == "__main__":
    main(logits_of, lambda: f"mlx-lm {version('mlx-lm')}")
