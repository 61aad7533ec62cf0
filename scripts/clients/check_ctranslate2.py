"""Client check: CTranslate2, by its own converter, in float32 on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch  # noqa: F401  (the converter imports both: once, not once a folder)
import transformers  # noqa: F401
from common import main, source_ids


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position."""
    if source_ids(folder) is not None:
        raise NotImplementedError("this check reads decoders alone")
    with tempfile.TemporaryDirectory() as out:
        ctranslate2.converters.TransformersConverter(str(folder)).convert(out, force=True)
        generator = ctranslate2.Generator(out, device="cpu", compute_type="float32", intra_threads=1)
        return np.array(generator.forward_batch([ids]))[0]


if __name__ == "__main__":
    main(logits_of, lambda: f"CTranslate2 {ctranslate2.__version__}")
