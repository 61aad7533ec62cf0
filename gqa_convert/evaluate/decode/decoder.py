"""One model decoding at one batch and context: its cache, its steps, its prefill.

The cache is filled with random keys and values in the place of a prefill's. What attention does with them costs the
same whatever they are, and so a context of 8k tokens costs no 8k-token prefill to reach.

Shapes: B sequences, K KV heads, C context, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gqa_convert.errors import UnsupportedModelError
from gqa_convert.evaluate.decode.device import timed
from gqa_convert.evaluate.models import cache_bytes

CACHES = ("dynamic", "static")
MODES = ("eager", "compile", "graph")


class Decoder:
    """A model with a cache of `context` tokens for each of `batch` sequences, ready to decode `steps` tokens.

    Args:
        model: a decoder-only model.
        cache_kind: `dynamic` (transformers' default; it grows by copying) or `static` (allocated whole).
        mode: `eager`; `compile`: torch.compile with CUDA graphs; `graph`: the eager kernels in one CUDA graph.
        batch: sequences decoded together.
        context: tokens in the cache when decoding starts.
        steps: tokens decoded at a time.
    """

    def __init__(self, model: Any, *, cache_kind: str, mode: str, batch: int, context: int, steps: int) -> None:
        self.model = model
        self.batch, self.context, self.steps = batch, context, steps
        self._kind, self._mode = cache_kind, mode
        self.device = next(model.parameters()).device
        self._ids = torch.full((batch, 1), 3, dtype=torch.long, device=self.device)
        self._cache: Any = None
        self._forward: Callable[[], object] | None = None

    @torch.inference_mode()
    def build(self) -> None:
        """Allocate and fill the cache; in the modes other than eager also compile or capture the step.

        Raises:
            UnsupportedModelError: if the model keeps anything but keys and values.
        """
        self._cache = filled_cache(
            self.model, kind=self._kind, batch=self.batch, context=self.context, room=self.steps + 1
        )
        self._forward = self._step_function()

    def drop(self) -> None:
        """Free the cache."""
        self._cache = self._forward = None

    @property
    def cache_bytes(self) -> int:
        """Bytes that the filled cache holds, as allocated."""
        return cache_bytes(self._cache)

    @torch.inference_mode()
    def seconds_per_step(self) -> float:
        """Decode `steps` tokens for every sequence, take the cache back to where it was, and return seconds a step."""
        seconds = timed(self._run, self.device)
        self._rewind()
        return seconds / self.steps

    def _run(self) -> None:
        assert self._forward is not None
        for _ in range(self.steps):
            self._forward()

    def _call(self, forward: Callable[..., Any]) -> Any:
        return forward(input_ids=self._ids, past_key_values=self._cache, use_cache=True).logits

    def _step_function(self) -> Callable[[], object]:
        if self._mode == "compile":
            compiled = torch.compile(self.model.forward, mode="reduce-overhead" if self._on_gpu else "default")
            for _ in range(3):  # compile, record, replay once
                self._call(compiled)
            self._set_length(self.context)
            return lambda: self._call(compiled)
        if self._mode == "graph":
            return self._captured()
        return lambda: self._call(self.model)

    @property
    def _on_gpu(self) -> bool:
        return bool(self.device.type == "cuda")

    def _captured(self) -> Callable[[], object]:
        """Capture one step as it runs eagerly. Warm up on a side stream first, as torch's guide to CUDA graphs says."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._call(self.model)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._set_length(self.context)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._call(self.model)
        self._set_length(self.context)
        return graph.replay

    def _rewind(self) -> None:
        if self._kind == "static":
            self._set_length(self.context)
        elif all(type(layer).__name__ == "DynamicLayer" for layer in self._cache.layers):
            for layer in self._cache.layers:
                layer.crop(-self.steps)
        else:  # a window that has moved on cannot be taken back
            self._cache = filled_cache(self.model, kind=self._kind, batch=self.batch, context=self.context, room=0)

    def _set_length(self, length: int) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = length


@torch.inference_mode()
def filled_cache(model: Any, *, kind: str, batch: int, context: int, room: int) -> Any:
    """Return a transformers cache that holds `context` random tokens a sequence, and room for more if static.

    Raises:
        UnsupportedModelError: if the model keeps anything but keys and values, or reads an encoder.
    """
    from transformers import DynamicCache, StaticCache

    shapes = _layer_shapes(model)
    if kind == "static":
        cache: Any = StaticCache(config=model.config, max_cache_len=context + room)
    else:
        cache = DynamicCache(config=model.config)
    generator = torch.Generator(shapes[0][0].device).manual_seed(0)
    for index, pair in enumerate(shapes):
        keys, values = (
            torch.randn(batch, x.shape[1], 1, x.shape[3], dtype=x.dtype, device=x.device, generator=generator)
            for x in pair
        )
        cache.update(keys.expand(-1, -1, context, -1), values.expand(-1, -1, context, -1), index)
    return cache


def _layer_shapes(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer for one sequence of two tokens, from a real forward pass."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the decode benchmark is for decoder-only models; an encoder-decoder model's time "
            "also depends on its input. `gqa eval` measures both kinds."
        )
    ids = torch.full((1, 2), 3, dtype=torch.long, device=next(model.parameters()).device)
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = list(getattr(cache, "layers", ()))
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not pairs or not all(isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 4 for k, v in pairs):
        raise UnsupportedModelError(f"{type(model).__name__}: its cache is not keys and values in every layer.")
    return [(k, v) for k, v in pairs if k is not None and v is not None]


@torch.inference_mode()
def prefill_seconds(model: Any, *, batch: int, context: int) -> float:
    """Seconds to read a prompt of `context` tokens for `batch` sequences and predict the next token."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
    return timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), device)


def bytes_read_per_step(model: Any) -> int:
    """Bytes of weights that decoding one token must read: all but an input embedding of its own (one row is read)."""
    output = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    total: int = sum(p.nbytes for p in model.parameters())
    shared = output is not None and output.weight is embedding.weight
    return total if shared else total - int(embedding.weight.nbytes)
