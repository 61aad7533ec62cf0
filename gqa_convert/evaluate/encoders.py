"""What a decoder that listens to an encoder must be given: the encoder's output, in the place of a real one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqa_convert.proof.model import encoder_width


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
    found: Any = BaseModelOutput(last_hidden_state=states)
    found.attention_mask = found.router_logits = None  # which some families look for
    return found


def decoder_inputs(ids: Tensor, encoded: Any) -> dict[str, Any]:
    """Return the arguments that make a model decode `ids` (batch, length); `encoded`: None without an encoder."""
    if encoded is None:
        return {"input_ids": ids}
    return {"decoder_input_ids": ids, "encoder_outputs": encoded}
