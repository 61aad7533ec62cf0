"""Load checkpoint folders to run them, and measure what their caches hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_convert.anatomy.anatomy import read_fields
from gqa_convert.calibrate.inputs import listens
from gqa_convert.checkpoint.embedded import DEMO
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.links import hub_snapshot
from gqa_convert.conversion.routes import routed
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.heads import kv_heads_words
from gqa_convert.hf.loading import Source, load_model, max_positions, pick_device, pick_dtype
from gqa_convert.tiny.model import encoder_width


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint to be measured, before it is loaded. `kv_heads` and `query_heads` are of its decoder.

    `per_layer` are the KV heads of each layer where they differ; `kv_heads` are then those of the one that has most.
    """

    name: str
    source: Source
    query_heads: int
    kv_heads: int
    per_layer: tuple[int, ...] = ()

    @property
    def heads(self) -> str:
        """The KV heads in words."""
        return kv_heads_words(self.kv_heads, self.per_layer)

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.source.folder

    @property
    def config(self) -> Any:
        """Its configuration."""
        return self.source.config

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it has an encoder and cross-attention."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def listens(self) -> bool:
        """Whether its encoder is given sound."""
        return listens(self.source)

    @property
    def max_context(self) -> int | None:
        """The longest context the model is made for, where its configuration says so."""
        return max_positions(self.config)


def subject(model: str, *, trust_remote_code: bool = False) -> Subject:
    """Describe a folder or hub id; `demo` is the checkpoint that comes with the package.

    Raises:
        GQAConvertError: if it cannot be read or has no KV heads.
    """
    folder = resolve_model(model)
    source = Source.open(folder, trust_remote_code=trust_remote_code)
    main = read_fields(routed(source).source)[0]
    snapshot = hub_snapshot(folder.resolve())
    name = snapshot[0].name.removeprefix("models--").replace("--", "/") if snapshot else folder.resolve().name
    name = DEMO if model == DEMO else name
    return Subject(
        name=name, source=source, query_heads=main.query_heads, kv_heads=main.kv_heads, per_layer=main.layers
    )


def load(model: Subject, *, dtype: str = "auto", device: str = "auto") -> Any:
    """Load a model for inference.

    Args:
        model: which one.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own on a GPU, float32 on the CPU.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        UsageError: if dtype or device cannot be had.
        CheckpointError: if weights are missing, or the loader refuses them.
    """
    where = pick_device(device)
    return load_model(model.source, dtype=pick_dtype(dtype, where), device=where)


def parameters(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def dtype_name(model: Any) -> str:
    """The dtype of most of the model's parameters, as transformers spells it."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """Yield every tensor of keys or values that a transformers cache holds; of the decoder's own attention only."""
    yield from _tensors(getattr(cache, "self_attention_cache", cache))


def _tensors(cache: Any) -> Iterator[Tensor]:
    for layer in getattr(cache, "layers", ()):
        plain = (getattr(layer, "keys", None), getattr(layer, "values", None))
        for tensor in layer.stored if hasattr(layer, "stored") else plain:  # one of fewer bits, or of the model's dtype
            if isinstance(tensor, Tensor):
                yield tensor


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache, as allocated; of the decoder's own attention only."""
    return sum(tensor.nbytes for tensor in cache_tensors(cache))


def cross_cache_bytes(cache: Any) -> int:
    """Bytes of keys and values of the encoder's output in a cache, as allocated; 0 where it has none."""
    return sum(tensor.nbytes for tensor in _tensors(getattr(cache, "cross_attention_cache", None)))


@torch.inference_mode()
def cache_bytes_per_token(model: Any, *, short: int = 4, long: int = 12) -> int:
    """Measure KV-cache bytes per token of the decoder's own attention, in the dtype the model runs in.

    Two passes of different length are compared, so that what does not grow with the text is left out.

    Raises:
        UnsupportedModelError: if the model returns no cache of keys and values.
    """
    held = [cache_bytes(_cache_after(model, length)) for length in (short, long)]
    if held[1] <= held[0]:
        raise UnsupportedModelError(f"{type(model).__name__}: its cache does not grow with the text.")
    return (held[1] - held[0]) // (long - short)


def _cache_after(model: Any, length: int) -> Any:
    device = next(model.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.long, device=device) + 3
    inputs = decoder_inputs(ids, encoder_output(model, 1, length) if has_encoder(model) else None)
    cache = getattr(model(**inputs, use_cache=True), "past_key_values", None)
    if cache is None or not hasattr(getattr(cache, "self_attention_cache", cache), "layers"):
        raise UnsupportedModelError(f"{type(model).__name__}: returns no cache of keys and values.")
    return cache


def has_encoder(model: Any) -> bool:
    """Whether a model's decoder reads an encoder's output through cross-attention."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def encoder_output(model: Any, batch: int, length: int) -> Any:
    """Return random states (batch, length, width) as transformers' encoders return them.

    No encoder is run, so that an encoder which reads sound or pictures is as good as one that reads text.
    """
    from transformers.modeling_outputs import BaseModelOutput

    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(0)
    shape = (batch, length, encoder_width(model.config))
    states = torch.randn(*shape, dtype=parameter.dtype, device=parameter.device, generator=generator)
    output: Any = BaseModelOutput(last_hidden_state=states)
    output.attention_mask = output.router_logits = None  # which some families look for
    return output


def decoder_inputs(ids: Tensor, encoded: Any) -> dict[str, Any]:
    """Return the arguments that make a model decode `ids` (batch, length); `encoded`: None without an encoder."""
    if encoded is None:
        return {"input_ids": ids}
    return {"decoder_input_ids": ids, "encoder_outputs": encoded}
