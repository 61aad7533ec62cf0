"""transformers, with the cache that it takes by itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers

CACHE = "read from the engine: its tensors"


def version() -> str:
    """Engine and version."""
    return f"transformers {transformers.__version__} (torch {torch.__version__})"


class Model:
    """A model and the cache that it decodes with."""

    def __init__(self, folder: str, work: str, dtype: str, threads: int, batch: int, tokens: int) -> None:
        torch.set_num_threads(threads)
        chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(folder), dtype=chosen).eval()
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        name = str(chosen).removeprefix("torch.")
        self.facts = {"dtype": name, "cache_dtype": name, "weight_bytes": weights}
        self._cache: Any = None

    @torch.inference_mode()
    def prefill(self, batch: int, context: int) -> float:
        """Seconds to read random prompts."""
        ids = torch.randint(3, int(self._model.get_input_embeddings().weight.shape[0]), (batch, context))
        started = time.perf_counter()
        self._model(input_ids=ids, use_cache=True)
        return time.perf_counter() - started

    @torch.inference_mode()
    def fill(self, batch: int, context: int, room: int) -> None:
        """Read two tokens for their shapes, and put random keys and values of the context's length in their place."""
        kept = self._model(input_ids=torch.full((1, 2), 3), use_cache=True).past_key_values
        self._cache = transformers.DynamicCache()
        self._ids = torch.full((batch, 1), 3)
        for number, layer in enumerate(kept.layers):
            if not isinstance(getattr(layer, "keys", None), torch.Tensor) or layer.keys.dim() != 4:
                raise ValueError("its cache is not keys and values in every layer")
            pair = (torch.randn(batch, x.shape[1], context, x.shape[3], dtype=x.dtype) for x in self._both(layer))
            self._cache.update(*pair, number)

    def _both(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.keys, layer.values

    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for layer in self._cache.layers for x in self._both(layer))

    @torch.inference_mode()
    def steps(self, count: int) -> float:
        """Decode and forget it again."""
        started = time.perf_counter()
        for _ in range(count):
            self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True)
        seconds = time.perf_counter() - started
        self._cache.crop(-count)  # what a positive number means differs between releases
        return seconds

    def drop(self) -> None:
        """Free the cache."""
        self._cache = None
