"""Greedy decoding as a measurement wants it: the likeliest token, whatever a checkpoint's generation settings ask for.

Shape suffixes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gqa_convert.hf import api

if TYPE_CHECKING:
    from torch import Tensor

_MARKS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""What stays of a checkpoint's generation settings, beside its end tokens: which token begins a text (and, of many
languages, says which), and which fills up."""


def greedy_ids(
    model: Any, inputs: dict[str, Tensor], *, tokens: int, ends: bool = True, stopping: Sequence[Any] = ()
) -> Tensor:
    """Let a model write `tokens` tokens at most, its likeliest at every step.

    Sampling, beams, penalties and the like that the checkpoint's generation settings ask for are left out: transformers
    would take them where settings that are passed to `generate` leave a value open.

    Args:
        model: a transformers model.
        inputs: what it reads: `input_ids` (B, S) and `attention_mask`.
        tokens: most that it writes.
        ends: whether its end tokens end a text; if not, exactly `tokens` are written.
        stopping: stopping criteria of transformers.

    Returns:
        What `generate` returns, ids (B, T): for a decoder the inputs first, for an encoder-decoder the start token.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    with torch.inference_mode(), api.quiet(), _marks_alone(model):
        settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=tokens)
        if not ends:
            model.generation_config.eos_token_id = None
        written: Tensor = model.generate(
            **inputs, generation_config=settings, stopping_criteria=StoppingCriteriaList(stopping)
        )
    return written


@contextmanager
def _marks_alone(model: Any) -> Iterator[None]:
    """Take everything but special tokens out of a model's generation settings, for a while."""
    from transformers import GenerationConfig

    whole = model.generation_config
    marks = {name: getattr(whole, name, None) for name in (*_MARKS, "eos_token_id")}
    if marks["pad_token_id"] is None:
        marks["pad_token_id"] = getattr(model.config, "pad_token_id", None) or 0
    model.generation_config = GenerationConfig(**marks)
    try:
        yield
    finally:
        model.generation_config = whole
