"""Engine check: OpenVINO, exported by optimum-intel, in float32, cache included."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optimum.exporters.openvino  # noqa: F401  (once, not once a folder)
import torch
from common import main, source_ids
from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position: half of them at once, the others through the cache."""
    source = source_ids(folder)
    auto = OVModelForCausalLM if source is None else OVModelForSeq2SeqLM
    model = auto.from_pretrained(folder, export=True, trust_remote_code=True, load_in_8bit=False, ov_config=dict(EXACT))
    if source is not None:
        return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits[0].numpy()
    rows, cache = [], None
    half = len(ids) // 2
    for start, stop in ((0, half), (half, len(ids))):
        mask = torch.ones(1, stop, dtype=torch.long)
        output = model(input_ids=torch.tensor([ids[start:stop]]), attention_mask=mask, past_key_values=cache)
        cache = output.past_key_values
        rows.append(output.logits[0].numpy())
    return np.concatenate(rows), {"cache_bytes_per_token": _cache_bytes(model, len(ids))}


def _cache_bytes(model: Any, length: int) -> float | None:
    """Bytes of the states that the request holds, per token: (batch, KV heads, tokens, width), in float32."""
    states = model.request.query_state()
    return sum(4.0 * int(math.prod(state.state.shape)) for state in states if len(state.state.shape) == 4) / length


if __name__ == "__main__":
    main(logits_of, lambda: f"OpenVINO {version('openvino')} (optimum-intel {version('optimum-intel')})")
