"""Families that do not decode text token by token: what stands for the full and the cached forward pass in each.

DiffusionGemma reads a prompt into a cache, piece by piece, and refines a canvas of tokens that attends to it. Pi0 reads
a prompt into a cache and predicts actions that attend to it. Voxtral Realtime hears sound as it writes, and
its encoder has a cache of its own. In each the cache must serve as well as what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Inputs = dict[str, Tensor]

TEXT = slice(4, 64)  # ids that no special token has


@dataclass(frozen=True)
class Unusual:
    """How one family is run: its inputs, one pass over all of them, and a pass through a cache made before."""

    inputs: Callable[[Any, int, int, Generator], Inputs]
    full: Callable[[Any, Inputs], Tensor]
    cached: Callable[[Any, Inputs], tuple[Tensor, Any]]


def _ids(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(TEXT.start, TEXT.stop, shape, generator=generator)


def _canvas_inputs(model: Any, batch: int, length: int, generator: Generator) -> Inputs:
    canvas = (batch, model.config.canvas_length)
    return {"input_ids": _ids((batch, length), generator), "decoder_input_ids": _ids(canvas, generator)}


def _canvas_full(model: Any, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def _canvas_cached(model: Any, inputs: Inputs) -> tuple[Tensor, Any]:
    cache, output = None, None
    prompt = inputs["input_ids"]
    for piece in (prompt[:, :-3], *prompt[:, -3:].split(1, dim=1)):
        output = model(**{**inputs, "input_ids": piece}, past_key_values=cache)
        cache = output.past_key_values
    assert output is not None
    return output.logits, cache


def _action_inputs(model: Any, batch: int, length: int, generator: Generator) -> Inputs:
    config = model.config
    width = config.vlm_config.text_config.hidden_size
    return {
        "state": torch.randn(batch, config.max_state_dim, generator=generator),
        "noise": torch.randn(batch, config.chunk_size, config.max_action_dim, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "inputs_embeds": torch.randn(batch, length, width, generator=generator),
    }


def _action_full(model: Any, inputs: Inputs) -> Tensor:
    # With the prompt embedded already, the pixels only say that there is one.
    logits: Tensor = model(**inputs, pixel_values=torch.zeros(1)).logits
    return logits


def _action_cached(model: Any, inputs: Inputs) -> tuple[Tensor, Any]:
    prompt = inputs["inputs_embeds"]
    cache = model.model.vlm(
        inputs_embeds=prompt, token_type_ids=torch.zeros_like(prompt)[:, :, 0], use_cache=True
    ).past_key_values
    given = {name: value for name, value in inputs.items() if name != "inputs_embeds"}
    return model(**given, past_key_values=cache).logits, cache


def _listening_inputs(model: Any, batch: int, length: int, generator: Generator) -> Inputs:
    config = model.config
    heard = (batch, length * config.downsample_factor, config.audio_config.hidden_size)
    return {
        "input_ids": _ids((batch, length), generator),
        "encoder_inputs_embeds": torch.randn(heard, generator=generator),
    }


def _listening_full(model: Any, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _listening_cached(model: Any, inputs: Inputs) -> tuple[Tensor, Any]:
    written, heard = inputs["input_ids"], inputs["encoder_inputs_embeds"]
    factor = model.config.downsample_factor
    caches: dict[str, Any] = {}
    pieces = []
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, written.shape[1]))]:
        output = model(
            input_ids=written[:, start:stop],
            encoder_inputs_embeds=heard[:, start * factor : stop * factor],
            use_cache=True,
            **caches,
        )
        caches = {name: output[name] for name in ("past_key_values", "encoder_past_key_values")}
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), caches["past_key_values"]


UNUSUAL: dict[str, Unusual] = {
    "diffusion_gemma": Unusual(_canvas_inputs, _canvas_full, _canvas_cached),
    "voxtral_realtime": Unusual(_listening_inputs, _listening_full, _listening_cached),
    "pi0": Unusual(_action_inputs, _action_full, _action_cached),
}
