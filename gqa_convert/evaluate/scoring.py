"""Run a model, or a model beside its original, over examples, and keep what is needed of each window.

Shapes: B examples, T targets, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gqa_convert.errors import VerificationError
from gqa_convert.evaluate.examples import Batch, Example, batches
from gqa_convert.evaluate.metric import PerToken, TokenScores
from gqa_convert.evaluate.metrics import rows

if TYPE_CHECKING:
    from gqa_convert.evaluate.places import Places

_CHUNK = 1 << 24
"""Logits that are turned into float32 log-probabilities at a time (64 MiB)."""


@dataclass
class WindowSums:
    """Sums over the scored tokens of each window; one entry per window.

    Attributes:
        tokens: scored tokens.
        size: UTF-8 bytes behind them.
        sums: by name, of each metric that is a mean over tokens; those of a pair for a converted model only.
        part_tokens: the scored tokens of each part (P,), see `places`; empty where none were told apart.
        part_sums: by name, the sums of each part (P,).
    """

    tokens: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)
    part_tokens: list[Tensor] = field(default_factory=list)
    part_sums: dict[str, list[Tensor]] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """A metric's mean per token over all windows."""
        return sum(self.sums[name]) / sum(self.tokens)


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Return logits_BTV. Without attention mask and cache: see the module `examples`."""
    device = next(model.parameters()).device
    inputs = {name: x.to(device, model.dtype if x.is_floating_point() else None) for name, x in batch.inputs.items()}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def score(
    original: Any,
    converted: Any | None,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    places: Places | None = None,
    on_windows: Callable[[int], None] | None = None,
) -> tuple[WindowSums, WindowSums | None, float]:
    """Score the original and, beside it, a converted model.

    Args:
        original: the model before conversion.
        converted: the model after it; None to score the original alone.
        examples: what to score.
        batch_size: windows run at a time.
        places: also keep sums by the parts that it sorts tokens into.
        on_windows: called with the number of windows done since the last call.

    Returns:
        Sums of the original, sums of the converted model, seconds taken.

    Raises:
        VerificationError: if a model's loss is not a finite number.
    """
    scored = score_beside(original, [converted], examples, batch_size=batch_size, places=places, on_windows=on_windows)
    first, second, seconds = scored[0]
    return first, None if converted is None else second, seconds


@torch.inference_mode()
def score_beside(
    original: Any,
    others: Sequence[Any | None],
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    places: Places | None = None,
    on_windows: Callable[[int], None] | None = None,
) -> list[tuple[WindowSums, WindowSums, float]]:
    """Score the original once, and several models beside it: as `score`, an entry for each of them.

    Args:
        original: the model before conversion.
        others: models to set beside it; None for none.
        examples: what to score.
        batch_size: windows run at a time.
        places: also keep sums by the parts that it sorts tokens into.
        on_windows: called with the number of windows done since the last call, those of each model by themselves.

    Raises:
        VerificationError: if a model's loss is not a finite number.
    """
    pairs = [(WindowSums(), WindowSums()) for _ in others]
    seconds = [0.0] * len(others)
    for batch in batches(examples, batch_size):
        started = time.perf_counter()
        logits = logits_of(original, batch)
        shared = time.perf_counter() - started
        for i, model in enumerate(others):
            started = time.perf_counter()
            other = None if model is None else logits_of(model, batch)
            _add(*pairs[i], batch, logits, other, places)
            del other
            seconds[i] += shared + time.perf_counter() - started
            if on_windows is not None:
                on_windows(len(batch.targets))
    for pair in pairs:
        for who, sums in zip(("the original", "the converted model"), pair, strict=True):
            sums.size = [example.size for example in examples]
            if not all(math.isfinite(value) for value in sums.sums.get("loss", ())):
                raise VerificationError(
                    f"{who}: the loss is not a finite number; the weights or their dtype are at fault."
                )
    return [(*pair, taken) for pair, taken in zip(pairs, seconds, strict=True)]


def _add(
    first: WindowSums,
    second: WindowSums,
    batch: Batch,
    logits: Tensor,
    other: Tensor | None,
    places: Places | None = None,
) -> None:
    """Add one batch; `first` is of the original, `second` of the converted model beside it."""
    device = logits.device
    targets, scored = batch.targets.to(device), batch.scored.to(device)
    of_one = {row.name: row.compute for row in rows("model") if isinstance(row.compute, PerToken)}
    of_pair = {row.name: row.compute for row in rows("pair") if isinstance(row.compute, PerToken)}
    values: dict[str, list[Tensor]] = {name: [] for name in of_one}
    values_other: dict[str, list[Tensor]] = {name: [] for name in of_one | of_pair}
    step = max(1, _CHUNK // (len(targets) * logits.shape[-1]))
    for t in range(0, targets.shape[1], step):
        part = slice(t, t + step)
        weight_BT = scored[:, part].double()
        alone = TokenScores(targets_BT=targets[:, part], logp_BTV=torch.log_softmax(logits[:, part].float(), -1))
        for name, compute in of_one.items():
            values[name].append(compute.values(alone).double() * weight_BT)
        if other is None:
            continue
        logq_BTV = torch.log_softmax(other[:, part].to(device).float(), -1)
        beside = TokenScores(targets_BT=alone.targets_BT, logp_BTV=logq_BTV, original_BTV=alone.logp_BTV)
        for name, compute in (of_one | of_pair).items():
            values_other[name].append(compute.values(beside).double() * weight_BT)
    tokens = scored.sum(1).tolist()
    for sums, parts in ((first, values), (second, values_other)) if other is not None else ((first, values),):
        sums.tokens += tokens
        joined = {name: torch.cat(chunks, 1) for name, chunks in parts.items()}
        for name, value_BT in joined.items():
            sums.sums.setdefault(name, []).extend(value_BT.sum(1).tolist())
        if places is not None:
            places.add(sums, batch, joined)
