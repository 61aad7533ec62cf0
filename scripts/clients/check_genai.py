"""Engine check: ONNX Runtime GenAI, built by its own model builder, in float32."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from common import main
from onnxruntime_genai.models.builder import create_model, parse_extra_options


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position, the last half of them one by one through the cache."""
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as cache:
        where = ("", str(folder), out, "fp32", "cpu", cache)
        create_model(*where, **parse_extra_options(*where, []))
        model = onnxruntime_genai.Model(out)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=64, batch_size=1)
        generator = onnxruntime_genai.Generator(model, parameters)
        rows = []
        half = len(ids) // 2
        for part in (ids[:half], *([token] for token in ids[half:])):
            generator.append_tokens(np.array([part], dtype=np.int32))
            rows.append(np.array(generator.get_output("logits")[0]))
        return np.concatenate(rows)


if __name__ == "__main__":
    main(logits_of, lambda: f"ONNX Runtime GenAI {version('onnxruntime-genai')}")
