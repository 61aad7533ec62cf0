"""T5's span corruption: spans of tokens are cut out of the input and become the target, a sentinel in their place.

Raffel et al. 2020 (arXiv 1910.10683), sections 3.1.4 and 3.3.4, and the mask of their code
(`random_spans_noise_mask`): 15 % of tokens, spans of 3 on average, text packed so that every input is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.encoding import Ids
from gqa_convert.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Corrupts blocks of `raw_length` tokens into inputs of `inputs_length` and targets of `targets_length`.

    Attributes:
        sentinels: ids of `<extra_id_0>`, `<extra_id_1>`, ... in order.
        eos: ends inputs and targets.
        raw_length: tokens of text a block.
        inputs_length: non-noise tokens, a sentinel for every span, EOS.
        targets_length: noise tokens, a sentinel for every span, EOS.
    """

    sentinels: tuple[int, ...]
    eos: int
    density: float
    mean_span: float
    raw_length: int
    inputs_length: int
    targets_length: int

    @classmethod
    def fitting(
        cls,
        inputs_length: int,
        *,
        sentinels: tuple[int, ...],
        eos: int,
        density: float = 0.15,
        mean_span: float = 3.0,
    ) -> SpanCorruption:
        """Find the longest text whose corrupted form fills inputs of `inputs_length` (568 for 512).

        Raises:
            UsageError: if the numbers are out of range or need more sentinels than there are.
        """
        if not 0 < density < 1 or mean_span < 1:
            raise UsageError(f"objective: density={density} must lie in (0, 1), mean_span={mean_span} be at least 1.")
        raw = inputs_length
        while _lengths(raw + 1, density, mean_span)[0] <= inputs_length:
            raw += 1
        inputs, targets = _lengths(raw, density, mean_span)
        if inputs > inputs_length:
            raise UsageError(f"objective: inputs of {inputs_length} tokens are too short for span corruption.")
        spans = _counts(raw, density, mean_span)[1]
        if spans > len(sentinels):
            raise UsageError(
                f"objective: inputs of {inputs_length} tokens need {spans} sentinels, the tokenizer has "
                f"{len(sentinels)}. Shorten data.context or lengthen objective.mean_span."
            )
        return cls(
            sentinels=sentinels,
            eos=eos,
            density=density,
            mean_span=mean_span,
            raw_length=raw,
            inputs_length=inputs,
            targets_length=targets,
        )

    def corrupt(self, ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Corrupt a block of `raw_length` ids; returns inputs and targets."""
        noise = noise_mask(len(ids), self.density, self.mean_span, rng)
        return (
            np.append(self._fold(ids, noise), self.eos),
            np.append(self._fold(ids, ~noise), self.eos),
        )

    def _fold(self, ids: Ids, away: NDArray[np.bool_]) -> Ids:
        """Replace every run of `away` tokens by the next sentinel."""
        starts = away & ~np.concatenate([[False], away[:-1]])
        number = np.cumsum(starts) - 1
        folded = np.where(starts, np.asarray(self.sentinels)[np.maximum(number, 0)], ids)
        return np.asarray(folded[~away | starts], np.int64)

    def reconstruct(self, inputs: Ids, targets: Ids) -> Ids:
        """Undo `corrupt`: put the target's spans back where the input has sentinels."""
        wanted = set(self.sentinels)
        spans: dict[int, list[int]] = {}
        current: list[int] = []
        for token in targets[:-1].tolist():
            if token in wanted:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        text: list[int] = []
        for token in inputs[:-1].tolist():
            text.extend(spans[token] if token in wanted else [token])
        return np.asarray(text, np.int64)


def _counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    noise = min(max(round(length * density), 1), length - 1)
    return noise, max(min(round(noise / mean_span), noise, length - noise), 1)


def _lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
    noise, spans = _counts(length, density, mean_span)
    return length - noise + spans + 1, noise + spans + 1


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw which of `length` tokens are noise: spans alternate with text, the first token is always text."""
    noise, spans = _counts(length, density, mean_span)
    sizes = np.stack([_segments(length - noise, spans, rng), _segments(noise, spans, rng)], axis=1).ravel()
    return np.repeat(np.tile([False, True], spans), sizes)


def _segments(total: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Cut `total` into `parts` pieces of at least one, every way alike likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def sentinel_ids(tokenizer: Any, limit: int = 100) -> tuple[int, ...]:
    """Ids of the tokenizer's `<extra_id_N>` tokens in order of N.

    Raises:
        UsageError: if it has none.
    """
    vocabulary = tokenizer.get_vocab()
    ids = []
    for number in range(limit):
        token = vocabulary.get(f"<extra_id_{number}>")
        if token is None:
            break
        ids.append(int(token))
    if not ids:
        raise UsageError("objective.kind: span_corruption needs sentinel tokens (<extra_id_0>, ...) in the tokenizer.")
    return tuple(ids)
