"""Caches whose keys and values are stored in 8 or 4 bits, as inference engines store them.

    fp8   8-bit floating point (e4m3) without a scale: `--kv-cache-dtype fp8` of vLLM and SGLang
    int8  blocks of 32 values of a head with one float16 scale each: `q8_0` of llama.cpp (8.5 bits a value)
    int4  the same in 4 bits: `q4_0` of llama.cpp (4.5 bits a value)

A token's keys and values are rounded by themselves, so one pass over a window reads what token-by-token decoding would
read. transformers' own QuantizedCache cannot be scored so: its first update returns what it was given, unrounded, and
it keeps the newest tokens whole.

Shapes: B sequences, K KV heads, T tokens, D head_dim, N blocks of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, EncoderDecoderCache

from gqa_convert.errors import UnsupportedModelError
from gqa_convert.evaluate.decode.settings import QUANTISED
from gqa_convert.evaluate.models import has_encoder

BLOCK = 32
"""Values of a head that share a scale, as in ggml; a whole head where its size is no multiple of it."""
_FP8 = torch.float8_e4m3fn

Stored = tuple[Tensor, Tensor]
"""Codes BKTC of one byte each, and scales BKTN in float16 (N is 0 where there are none)."""


def store(x_BKTD: Tensor, name: str) -> Stored:
    """Round keys or values to a format of `QUANTISED`.

    Raises:
        UnsupportedModelError: for int4 of heads of an odd size.
    """
    if name == "fp8":
        limit = torch.finfo(_FP8).max
        codes = x_BKTD.clamp(-limit, limit).to(_FP8).view(torch.uint8)
        return codes, x_BKTD.new_empty((*x_BKTD.shape[:-1], 0), dtype=torch.float16)
    size = x_BKTD.shape[-1]
    blocks = x_BKTD.float().unflatten(-1, (-1, BLOCK if size % BLOCK == 0 else size))
    if name == "int8":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = (blocks * _inverse(scale)).round().to(torch.int8).flatten(-2).view(torch.uint8)
    else:
        if size % 2:
            raise UnsupportedModelError(f"int4 cache: heads of {size} values cannot be stored two to a byte.")
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # with its sign, which gets the 16th code
        scale = largest / -8
        whole = (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15).to(torch.uint8).flatten(-2)
        codes = whole[..., ::2] | (whole[..., 1::2] << 4)
    return codes, scale.squeeze(-1).half()


def restore(stored: Stored, name: str, dtype: torch.dtype) -> Tensor:
    """Undo `store`, as far as rounding lets it: (B, K, T, D) in `dtype`."""
    codes, scales = stored
    if name == "fp8":
        return codes.view(_FP8).to(dtype)
    if name == "int8":
        whole = codes.view(torch.int8).float()
    else:
        whole = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float() - 8
    scaled: Tensor = whole.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None].float()
    return scaled.flatten(-2).to(dtype)


def _inverse(scale: Tensor) -> Tensor:
    inverse: Tensor = torch.where(scale == 0, 0, 1 / scale)
    return inverse


class QuantisedLayer(DynamicLayer):
    """A layer of a transformers cache that stores in one of the formats; whoever reads it gets what can be restored.

    Attributes:
        stored: codes and scales of keys, then of values; nothing before the first update.
    """

    def __init__(self, name: str) -> None:
        self.format = name
        self.stored: list[Tensor] = []
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """All keys, restored: cross-attention reads them from here, after its first step."""
        return self._restored(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:  # set by transformers to None alone, when a cache begins or is reset
        assert value is None
        self.stored = []

    @property
    def values(self) -> Tensor | None:
        """All values, restored."""
        return self._restored(2)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        assert value is None
        self.stored = []

    def _restored(self, first: int) -> Tensor | None:
        if not self.stored:
            return None
        codes, scales = self.stored[first : first + 2]
        return restore((codes, scales), self.format, self.dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, K, T, D); return all that are stored, restored."""
        new = [*store(key_states, self.format), *store(value_states, self.format)]
        if self.stored:
            new = [torch.cat(both, -2) for both in zip(self.stored, new, strict=True)]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.stored = new
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that are stored."""
        return self.stored[0].shape[-2] if self.stored else 0

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.stored = [change(x) for x in self.stored]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, so many as a negative number says."""
        if tokens_to_remove:
            self._change(lambda x: x[..., :tokens_to_remove, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._change(lambda x: x[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequences in another order, as beam search does."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))


def quantised_cache(name: str, *, across: bool = False) -> Any:
    """An empty cache of a format; with `across` also for the encoder's output."""
    layer: Any = partial(QuantisedLayer, name)
    own, cross = (Cache(layer_class_to_replicate=layer) for _ in range(2))
    return EncoderDecoderCache(own, cross) if across else own


class WithCache:
    """A model that runs with a cache of this format whenever it is called; all else is the model's own.

    Raises:
        UnsupportedModelError: if the model keeps anything but keys and values.
    """

    def __init__(self, model: Any, name: str) -> None:
        from gqa_convert.evaluate.decode.caches import layer_pairs

        assert name in QUANTISED
        layer_pairs(model)
        self._model, self._name = model, name

    def __call__(self, *, use_cache: bool = True, **inputs: Any) -> Any:
        """Run the model on a whole text: every position reads rounded keys and values, its own too."""
        cache = quantised_cache(self._name, across=has_encoder(self._model))
        return self._model(**inputs, use_cache=True, past_key_values=cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
