"""Held-out loss of a checkpoint folder on fixed windows of text.

Shapes: B windows, T tokens per window.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

# Enough for a figure good to a few hundredths of a nat, and few enough for the demo to take seconds.
WINDOWS = 96


def encode_documents(documents: Iterable[str], tokenizer: Any) -> Tensor:
    """Join documents into one stream of token ids, the EOS token after each."""
    ids: list[int] = []
    for text in documents:
        ids.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.long)


def sample_windows(stream: Tensor, *, length: int, count: int = WINDOWS) -> Tensor:
    """Cut a stream into windows of `length` tokens side by side, and take `count` of them evenly spread.

    Returns:
        ids_BT; fewer than `count` rows where the stream is short.

    Raises:
        UsageError: if the stream does not fill one window.
    """
    whole = len(stream) // length
    if whole == 0:
        raise UsageError(f"the held-out text has {len(stream)} tokens, less than one window of {length}.")
    ids_BT = stream[: whole * length].view(whole, length)
    if whole <= count:
        return ids_BT
    return ids_BT[torch.arange(count) * whole // count]


@torch.inference_mode()
def model_loss(model: Any, ids_BT: Tensor, *, batch: int = 16) -> float:
    """Mean next-token loss of a model in nats per token, every window scored by itself.

    No attention mask and no cache are passed: with either, transformers would take another attention path.
    """
    total, tokens = 0.0, 0
    for part in ids_BT.split(batch):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
        targets = part[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
        tokens += targets.numel()
    return total / tokens


def held_out_loss(folder: Path, ids_BT: Tensor) -> float:
    """Load a checkpoint folder in float32 and return its loss on the windows, in nats per token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model_loss(model.eval(), ids_BT)
