"""OpenVINO on the CPU, exported by optimum-intel and run without it: its keys and values are states of the request."""

from __future__ import annotations

import time
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from optimum.intel import OVModelForCausalLM

CACHE = "read from the engine: the states of its request, in the precision that it says it keeps them in"
PRECISION = {"float32": ("f32", "f32"), "float16": ("f32", "f16"), "bfloat16": ("bf16", "bf16")}  # computing, cache
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i8": 1, "u4": 0.5, "i4": 0.5}


def version() -> str:
    """Engine and version."""
    return f"OpenVINO {installed('openvino')} (optimum-intel {installed('optimum-intel')})"


class Model:
    """A compiled model and the request that it decodes in."""

    def __init__(self, folder: str, work: str, dtype: str, threads: int, batch: int, tokens: int) -> None:
        name = "float32" if dtype == "auto" else dtype
        computing, kept = PRECISION[name]
        model = OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False)
        model.save_pretrained(work)
        file = Path(work) / "openvino_model.xml"
        weights = file.with_suffix(".bin").stat().st_size
        settings = {"INFERENCE_PRECISION_HINT": computing, "KV_CACHE_PRECISION": kept}
        self._compiled: Any = openvino.Core().compile_model(
            str(file), "CPU", settings | {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        )
        kept = str(self._compiled.get_property("KV_CACHE_PRECISION").to_string()).replace("float", "f")
        self._bytes_per_value = BYTES.get(kept, 4)
        self._inputs = {port.get_any_name() for port in self._compiled.inputs}
        self._vocabulary = int(model.config.vocab_size)
        self._request: Any = None
        self.facts = {"dtype": computing, "cache_dtype": kept, "weight_bytes": weights}

    def _infer(self, request: Any, ids: Any, past: int) -> None:
        batch, length = ids.shape
        places = np.broadcast_to(np.arange(past, past + length), (batch, length))
        values = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, past + length), dtype=np.int64),
            "position_ids": np.ascontiguousarray(places),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        request.infer({name: value for name, value in values.items() if name in self._inputs})

    def prefill(self, batch: int, context: int) -> float:
        """Seconds to read random prompts; logits of every position are computed where the graph has no other way."""
        request = self._compiled.create_infer_request()
        ids = np.random.default_rng(0).integers(3, self._vocabulary, (batch, context))
        started = time.perf_counter()
        self._infer(request, ids, 0)
        return time.perf_counter() - started

    def fill(self, batch: int, context: int, room: int) -> None:
        """Read two tokens for the states' shapes, and put random ones of the context's length in their place.

        States of one shape get the same values, which are in memory once.
        """
        self._request = self._compiled.create_infer_request()
        self._ids = np.full((batch, 1), 3)
        self._infer(self._request, np.full((batch, 2), 3), 0)
        shapes = {state.name: tuple(state.state.shape) for state in self._request.query_state()}
        if not shapes or any(len(shape) != 4 for shape in shapes.values()):
            raise ValueError("its states are not keys and values in every layer")
        draw = np.random.default_rng(0)
        drawn = {
            shape: openvino.Tensor(draw.standard_normal((shape[0], shape[1], context, shape[3]), dtype=np.float32))
            for shape in set(shapes.values())
        }
        self._values = {name: drawn[shape] for name, shape in shapes.items()}
        self._length = context
        self._rewind()

    def _rewind(self) -> None:
        for state in self._request.query_state():
            state.state = self._values[state.name]

    def cache_bytes(self) -> int:
        """Bytes of all states."""
        sizes = [int(np.prod(state.state.shape)) for state in self._request.query_state()]
        return int(sum(sizes) * self._bytes_per_value)

    def steps(self, count: int) -> float:
        """Decode and forget it again. The first step takes the states in and is not timed."""
        self._infer(self._request, self._ids, self._length)
        started = time.perf_counter()
        for step in range(1, count + 1):
            self._infer(self._request, self._ids, self._length + step)
        seconds = time.perf_counter() - started
        self._rewind()
        return seconds

    def drop(self) -> None:
        """Free the request."""
        self._request = None
        self._values = {}
