"""One model decoding at one batch and context: its cache, its steps, its prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gqa_convert.evaluate.decode.caches import filled_cache
from gqa_convert.evaluate.decode.device import timed
from gqa_convert.evaluate.models import cache_bytes, cross_cache_bytes, decoder_inputs, encoder_output

_WARM_UP = 3
"""Steps taken before timing, for which a static cache needs room."""


class Decoder:
    """A model with a cache of `context` tokens for each of `batch` sequences, ready to decode `steps` tokens.

    Args:
        model: with a decoder.
        cache_kind: `dynamic` (transformers' default; it grows by copying), `static` (allocated whole), or a format of
            `gqa_convert.evaluate.cache_formats` (grows by copying too, and is unpacked at every step).
        mode: `eager`; `compile`: torch.compile with CUDA graphs; `graph`: the eager kernels in one CUDA graph.
        batch: sequences decoded together.
        context: tokens in the cache when decoding starts.
        steps: tokens decoded at a time.
        source: positions of the encoder's output that cross-attention reads; None for a model without an encoder.
    """

    def __init__(
        self,
        model: Any,
        *,
        cache_kind: str,
        mode: str,
        batch: int,
        context: int,
        steps: int,
        source: int | None = None,
    ) -> None:
        self.model = model
        self.batch, self.context, self.steps, self.source = batch, context, steps, source
        self._kind, self._mode = cache_kind, mode
        self.device = next(model.parameters()).device
        self._ids = torch.full((batch, 1), 3, dtype=torch.long, device=self.device)
        self._cache: Any = None
        self._encoded: Any = None
        self._forward: Callable[[], object] | None = None

    @torch.inference_mode()
    def build(self) -> None:
        """Allocate and fill the cache; in the modes other than eager also compile or capture the step.

        Raises:
            UnsupportedModelError: if the model keeps anything but keys and values.
        """
        self._cache = self._filled()
        self._encoded = None if self.source is None else encoder_output(self.model, self.batch, self.source)
        self._forward = self._step_function()

    def _filled(self) -> Any:
        return filled_cache(
            self.model,
            kind=self._kind,
            batch=self.batch,
            context=self.context,
            room=max(self.steps + 1, _WARM_UP),
            source=self.source,
        )

    def drop(self) -> None:
        """Free the cache."""
        self._cache = self._encoded = self._forward = None

    @property
    def cache_bytes(self) -> int:
        """Bytes that the filled cache of the decoder's own attention holds, as allocated."""
        return cache_bytes(self._cache)

    @property
    def cross_cache_bytes(self) -> int:
        """Bytes that the filled cache of cross-attention holds, as allocated; 0 where there is none."""
        return cross_cache_bytes(self._cache)

    @torch.inference_mode()
    def seconds_per_step(self) -> float:
        """Decode `steps` tokens per sequence, take the cache back to where it was, and return seconds per step."""
        seconds = timed(self._run, self.device)
        self._rewind()
        return seconds / self.steps

    def _run(self) -> None:
        assert self._forward is not None
        for _ in range(self.steps):
            self._forward()

    def _call(self, forward: Callable[..., Any]) -> Any:
        inputs = decoder_inputs(self._ids, self._encoded)
        return forward(**inputs, past_key_values=self._cache, use_cache=True).logits

    def _step_function(self) -> Callable[[], object]:
        if self._mode == "compile":
            compiled = torch.compile(self.model.forward, mode="reduce-overhead" if self._on_gpu else "default")
            for _ in range(_WARM_UP):  # compile, record, replay once
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
        elif all(type(layer).__name__ in ("DynamicLayer", "QuantisedLayer") for layer in self._own_layers):
            for layer in self._own_layers:
                layer.crop(-self.steps)
        else:  # a window that has moved on cannot be taken back
            self._cache = self._filled()

    @property
    def _own_layers(self) -> Any:
        return getattr(self._cache, "self_attention_cache", self._cache).layers

    def _set_length(self, length: int) -> None:
        for layer in self._own_layers:
            layer.cumulative_length.fill_(length)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = length


@torch.inference_mode()
def prefill_seconds(model: Any, *, batch: int, context: int, source: int | None = None) -> float | None:
    """Seconds to read a prompt for `batch` sequences and predict the next token.

    The prompt is `context` tokens, or, for a model with an encoder, the `source` tokens that this reads: the encoder's
    pass, the keys and values of its output, and the decoder's first token. None where the encoder reads something
    else, or tokens and something else.
    """
    device = next(model.parameters()).device
    if source is None:
        ids = _random_ids(model.config.get_text_config(decoder=True).vocab_size, batch, context).to(device)
        return timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), device)
    if model.main_input_name != "input_ids":
        return None
    ids = _random_ids(model.get_input_embeddings().weight.shape[0], batch, source).to(device)
    first = torch.full((batch, 1), 3, dtype=torch.long, device=device)
    try:
        return timed(lambda: model(input_ids=ids, decoder_input_ids=first, use_cache=True), device)
    except (TypeError, ValueError):  # asks, for instance, where on the page each token stands
        return None


def _random_ids(vocabulary: int, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(4, vocabulary - 1), vocabulary, (batch, length), generator=generator)
