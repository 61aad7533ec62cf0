"""Run a model, or a model beside its original, over examples, and keep what is needed of each window.

Shapes: B examples, T targets, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gqa_convert.errors import VerificationError
from gqa_convert.evaluate.examples import Batch, Example, batches

_CHUNK = 1 << 24
"""Logits that are turned into float32 log-probabilities at a time (64 MiB)."""


@dataclass
class WindowSums:
    """Sums over the scored tokens of each window; one entry a window.

    Attributes:
        loss: negative log-likelihood, nats.
        tokens: scored tokens.
        size: UTF-8 bytes behind them.
        kl: KL(original || model), nats; empty for the original itself.
        agree: tokens at which both models rank the same token first; empty for the original itself.
    """

    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[int] = field(default_factory=list)


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Return logits_BTV. Without attention mask and cache: see the module `examples`."""
    device = next(model.parameters()).device
    inputs = {name: x.to(device) for name, x in batch.inputs.items()}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


@torch.inference_mode()
def score(
    original: Any,
    converted: Any | None,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    on_windows: Callable[[int], None] | None = None,
) -> tuple[WindowSums, WindowSums | None, float]:
    """Score the original and, beside it, a converted model.

    Args:
        original: the model before conversion.
        converted: the model after it; None to score the original alone.
        examples: what to score.
        batch_size: windows run at a time.
        on_windows: called with the number of windows done since the last call.

    Returns:
        Sums of the original, sums of the converted model, seconds taken.

    Raises:
        VerificationError: if a model's loss is not a finite number.
    """
    started = time.perf_counter()
    first, second = WindowSums(), WindowSums()
    for batch in batches(examples, batch_size):
        logits = logits_of(original, batch)
        other = None if converted is None else logits_of(converted, batch)
        _add(first, second, batch, logits, other)
        if on_windows is not None:
            on_windows(len(batch.targets))
    for sums in (first, second):
        sums.size = [example.size for example in examples]
    for who, sums in (("the original", first), ("the converted model", second)):
        if not all(abs(value) < float("inf") for value in sums.loss):
            raise VerificationError(f"{who}: the loss is not a finite number; the weights or their dtype are at fault.")
    return first, None if converted is None else second, time.perf_counter() - started


def _add(first: WindowSums, second: WindowSums, batch: Batch, logits: Tensor, other: Tensor | None) -> None:
    device = logits.device
    targets, scored = batch.targets.to(device), batch.scored.to(device)
    count = len(targets)
    zero = torch.zeros(count, dtype=torch.float64, device=device)
    loss, loss_other, kl, agree = zero, zero.clone(), zero.clone(), zero.clone()
    step = max(1, _CHUNK // (count * logits.shape[-1]))
    for t in range(0, targets.shape[1], step):
        part = slice(t, t + step)
        weight = scored[:, part].double()
        logp = torch.log_softmax(logits[:, part].float(), -1)
        loss = loss - (_chosen(logp, targets[:, part]) * weight).sum(1)
        if other is None:
            continue
        logq = torch.log_softmax(other[:, part].to(device).float(), -1)
        loss_other = loss_other - (_chosen(logq, targets[:, part]) * weight).sum(1)
        # A logit of -inf (a masked token) gives 0 * inf; such tokens add nothing to the divergence.
        terms = torch.nan_to_num(logp.exp() * (logp - logq), nan=0.0)
        kl = kl + (terms.sum(-1).double() * weight).sum(1)
        agree = agree + ((logp.argmax(-1) == logq.argmax(-1)) * weight).sum(1)
    tokens = scored.sum(1).tolist()
    first.loss += loss.tolist()
    first.tokens += tokens
    if other is not None:
        second.loss += loss_other.tolist()
        second.tokens += tokens
        second.kl += kl.tolist()
        second.agree += [int(value) for value in agree.tolist()]


def _chosen(logp_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return logp_BTV.gather(-1, targets_BT[..., None]).squeeze(-1).double()
