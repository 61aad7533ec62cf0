"""What a model is scored on: inputs, the tokens it should predict, and which of them count.

Examples of one shape are stacked into batches without padding, so no attention mask is ever needed: passing one, or
leaving the cache on, takes transformers to other attention paths.

Shapes: B examples, T targets, S encoder tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gqa_convert.data.reading import read_records
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.text import TokenStream, Window, windows

NOISE_DENSITY = 0.15
"""Share of a window's tokens that span corruption hides (T5, Raffel et al. 2020, section 3.1.4)."""
MEAN_SPAN = 3
"""Tokens in a hidden span, on average (same)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One window or pair.

    Attributes:
        inputs: what the model is called with, each of shape (T,) or (S,).
        targets: (T,) the token after each position.
        scored: (T,) bool: which targets count.
        size: UTF-8 bytes of text behind the scored targets.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    scored: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of all inputs; examples of one shape can be stacked."""
        return tuple(len(x) for x in self.inputs.values())


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples of one shape, stacked: see `Example`."""

    inputs: dict[str, Tensor]
    targets: Tensor
    scored: Tensor


def batches(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Stack neighbours of one shape, at most `size` at a time, in order."""
    start = 0
    while start < len(examples):
        stop = start
        while stop < min(len(examples), start + size) and examples[stop].shape == examples[start].shape:
            stop += 1
        part = examples[start:stop]
        yield Batch(
            inputs={name: torch.stack([e.inputs[name] for e in part]) for name in part[0].inputs},
            targets=torch.stack([e.targets for e in part]),
            scored=torch.stack([e.scored for e in part]),
        )
        start = stop


def causal_examples(stream: TokenStream, cut: Sequence[Window]) -> list[Example]:
    """Windows of a stream for a decoder-only model: every token predicts the next. See `windows`."""
    ids = torch.tensor(stream.ids, dtype=torch.long)
    counts = torch.ones(len(ids), dtype=torch.bool) if stream.scored is None else torch.tensor(stream.scored)
    sizes = torch.tensor(stream.sizes, dtype=torch.long)
    examples = []
    for window in cut:
        part = slice(window.start, window.start + window.length)
        ids_T = ids[part]
        scored_T = counts[part][1:] & (torch.arange(1, len(ids_T)) >= window.first)
        examples.append(
            Example(
                inputs={"input_ids": ids_T[:-1]},
                targets=ids_T[1:],
                scored=scored_T,
                size=int(sizes[part][1:][scored_T].sum()),
            )
        )
    return examples


def span_examples(
    stream: TokenStream, sentinels: Sequence[int], *, start: int, context: int, limit: int | None = None, seed: int = 0
) -> list[Example]:
    """Windows with spans hidden, for an encoder-decoder model trained by span corruption (T5).

    The encoder sees the window with each span replaced by a sentinel; the decoder must write every sentinel and the
    tokens it hides. The same seed hides the same spans, so models are compared on the same task.

    Args:
        stream: the text.
        sentinels: ids of the sentinel tokens, first to last.
        start: the decoder's first input token.
        context: tokens per window, before hiding.
        limit: at most this many windows, evenly spread.
        seed: of the choice of spans.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for window in windows(len(stream.ids), context=context, stride=context, limit=limit):
        hidden = _hidden_spans(window.length, len(sentinels), generator)
        source: list[int] = []
        target: list[int] = []
        size, place = 0, 0
        for sentinel, (first, last) in zip(sentinels, hidden, strict=False):
            source += [*stream.ids[window.start + place : window.start + first], sentinel]
            target += [sentinel, *stream.ids[window.start + first : window.start + last]]
            size += sum(stream.sizes[window.start + first : window.start + last])
            place = last
        source += stream.ids[window.start + place : window.start + window.length]
        examples.append(_pair(source, target, start, size))
    return examples


def _hidden_spans(length: int, most: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Choose spans (first, past last): as many and as long together in every window, so that shapes agree."""
    noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
    count = max(1, min(round(noise / MEAN_SPAN), most, noise, length - noise))
    hidden = _parts(noise, count, generator)
    shown = _parts(length - noise, count, generator)
    spans, place = [], 0
    for gap, span in zip(shown, hidden, strict=True):
        spans.append((place + gap, place + gap + span))
        place += gap + span
    return spans


def _parts(total: int, count: int, generator: torch.Generator) -> list[int]:
    """Split `total` into `count` positive parts, every split equally likely."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    edges = [0, *cuts, total]
    return [b - a for a, b in pairwise(edges)]


def pair_examples(
    data: str, tokenizer: Any, *, start: int, context: int, fields: tuple[str, str] = ("input", "target")
) -> list[Example]:
    """Input and target texts of a .jsonl file, for an encoder-decoder model; both cut at `context` tokens.

    Raises:
        UsageError: if a line lacks one of the two fields.
    """
    examples = []
    for record in read_records(data):
        texts = [record.get(name) for name in fields]
        if not all(isinstance(text, str) and text for text in texts):
            raise UsageError(f"--data {data}: a line lacks text in {fields[0]!r} or {fields[1]!r}.")
        source, target = (list(tokenizer(text)["input_ids"])[:context] for text in texts)
        examples.append(_pair(source, target, start, len(str(texts[1]).encode())))
    return examples


def _pair(source: list[int], target: list[int], start: int, size: int) -> Example:
    targets = torch.tensor(target, dtype=torch.long)
    return Example(
        inputs={
            "input_ids": torch.tensor(source, dtype=torch.long),
            "decoder_input_ids": torch.tensor([start, *target[:-1]], dtype=torch.long),
        },
        targets=targets,
        scored=torch.ones(len(targets), dtype=torch.bool),
        size=size,
    )
