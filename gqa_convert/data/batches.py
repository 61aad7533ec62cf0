"""Batches: which blocks a step trains on, on which process, as tensors.

Step n of every run takes blocks `n * B` to `(n + 1) * B`, whatever the number of processes and of micro-batches, so
none of these changes what is learnt. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gqa_convert.data.blocks import Block, Blocks
from gqa_convert.data.conversations import TOKEN, UNSCORED
from gqa_convert.data.spans import SpanCorruption
from gqa_convert.errors import UsageError

IGNORE = -100


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass gets.

    Attributes:
        inputs: keyword arguments of the model: `input_ids` (B, T), and `position_ids` or `decoder_input_ids`.
        labels: (B, T) ids to predict at each position (already shifted); `IGNORE` where there is none.
        blocks: numbers of the training blocks that the rows are; empty for held-out ones.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    blocks: tuple[int, ...] = ()

    @property
    def valid(self) -> int:
        """Positions that are scored."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """Move to a device."""
        moved = {key: value.to(device, non_blocking=True) for key, value in self.inputs.items()}
        return MicroBatch(moved, self.labels.to(device, non_blocking=True), self.blocks)


Collate = Callable[[Sequence[tuple[int, Block, int]]], MicroBatch]
"""Makes a micro-batch of blocks, each with its number and how many of its tokens are real."""


def collate_causal(separate: bool) -> Collate:
    """Next-token prediction, but of tokens that are marked as context (see `gqa_convert.data.conversations`).

    With `separate`, positions restart at each document and none predicts the next one's.
    """

    def collate(blocks: Sequence[tuple[int, Block, int]]) -> MicroBatch:
        ids = np.stack([block.ids for _, block, _ in blocks])
        labels = np.where(ids[:, 1:] & UNSCORED, IGNORE, ids[:, 1:])
        inputs = {"input_ids": torch.from_numpy(ids[:, :-1] & TOKEN)}
        for row, (_, _, real) in enumerate(blocks):
            labels[row, real - 1 :] = IGNORE
        if separate:
            documents = np.stack([block.documents for _, block, _ in blocks])
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORE
            inputs["position_ids"] = torch.from_numpy(restarting_positions(documents[:, :-1]))
        return MicroBatch(inputs, torch.from_numpy(labels))

    return collate


def restarting_positions(documents: Any) -> Any:
    """Positions (B, T) that count from 0 within each run of equal document numbers."""
    count = documents.shape[1]
    index = np.arange(count)
    starts = np.ones_like(documents, dtype=bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def collate_spans(corruption: SpanCorruption, *, seed: int, decoder_start: int) -> Collate:
    """Span corruption; the spans of a block are drawn from (seed, block number)."""

    def collate(blocks: Sequence[tuple[int, Block, int]]) -> MicroBatch:
        pairs = [
            corruption.corrupt(block.ids[:-1], np.random.default_rng([seed, 2, number])) for number, block, _ in blocks
        ]
        labels = torch.from_numpy(np.stack([targets for _, targets in pairs]))
        shifted = torch.full_like(labels, decoder_start)
        shifted[:, 1:] = labels[:, :-1]
        inputs = torch.from_numpy(np.stack([inputs for inputs, _ in pairs]))
        return MicroBatch({"input_ids": inputs, "decoder_input_ids": shifted}, labels)

    return collate


def collate_pairs(*, decoder_start: int, pad: int) -> Collate:
    """Texts and their answers for an encoder-decoder, a row for each document of a block.

    Tokens that are marked as context (see `gqa_convert.data.conversations`) are the text, the others the answer. Rows
    are as long as the longest; a block without an answer leaves a row that is not scored.
    """

    def collate(blocks: Sequence[tuple[int, Block, int]]) -> MicroBatch:
        texts, answers = [], []
        for _, block, _ in blocks:
            for document in np.unique(block.documents):
                ids = block.ids[block.documents == document]
                context = (ids & UNSCORED) != 0
                if context.any() and not context.all():
                    texts.append(torch.from_numpy(ids[context] & TOKEN))
                    answers.append(torch.from_numpy(ids[~context]))
        if not texts:
            texts, answers = [torch.tensor([pad])], [torch.tensor([IGNORE])]
        labels = pad_sequence(answers, batch_first=True, padding_value=IGNORE)
        shifted = torch.full_like(labels, decoder_start)
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, pad)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        inputs = pad_sequence(texts, batch_first=True, padding_value=pad)
        return MicroBatch({"input_ids": inputs, "attention_mask": mask, "decoder_input_ids": shifted}, labels)

    return collate


class StepBatches:
    """The micro-batches of each step for one process, prepared a step ahead in a thread.

    Args:
        blocks: where blocks come from.
        collate: makes tensors of them.
        sequences: blocks a step, over all processes.
        micro: blocks of one forward pass on one process.
        processes: how many there are.
        rank: which one this is.

    Raises:
        UsageError: if `sequences` is no multiple of `micro x processes`.
    """

    def __init__(
        self, blocks: Blocks, collate: Collate, *, sequences: int, micro: int, processes: int, rank: int
    ) -> None:
        self.accumulation = accumulation_steps(sequences, micro=micro, processes=processes)
        self._blocks, self._collate = blocks, collate
        self._sequences, self._micro, self._processes, self._rank = sequences, micro, processes, rank
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, number: int) -> list[MicroBatch]:
        """Return the micro-batches of step `number` (from 0), and start on the next step's."""
        if self._ahead is not None and self._ahead[0] == number:
            batches = self._ahead[1].result()
        else:
            if self._ahead is not None:
                self._ahead[1].result()  # never two readers of one stream
            batches = self._make(number)
        self._ahead = (number + 1, self._pool.submit(self._make, number + 1))
        return batches

    def settle(self) -> None:
        """Wait until nothing is being prepared, so that the position of the blocks can be read."""
        if self._ahead is not None:
            self._ahead[1].result()

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, number: int) -> list[MicroBatch]:
        batches = []
        for part in range(self.accumulation):
            first = number * self._sequences + (part * self._processes + self._rank) * self._micro
            rows = range(first, first + self._micro)
            batch = self._collate([(i, self._blocks.get(i), _FULL) for i in rows])
            batches.append(replace(batch, blocks=tuple(rows)))
        return batches


_FULL = 1 << 62


def accumulation_steps(sequences: int, *, micro: int, processes: int) -> int:
    """Micro-batches a step on each process.

    Raises:
        UsageError: if `sequences` is no multiple of `micro x processes`, with a number that works.
    """
    each = micro * processes
    if sequences % each:
        raise UsageError(
            f"train.batch_sequences={sequences} is no multiple of micro_batch {micro} x {processes} processes. "
            f"Use {max(each, sequences - sequences % each)}, or a smaller micro_batch."
        )
    return sequences // each


def evaluation_batches(
    blocks: Sequence[tuple[Block, int]], collate: Collate, *, micro: int, processes: int, rank: int
) -> Iterator[MicroBatch]:
    """Split held-out blocks over processes. Every process gets as many batches, the last perhaps with no label at all.

    Sharded models gather weights in every forward pass, so no process may run fewer of them than another.
    """
    each = micro * processes
    for start in range(0, len(blocks), each):
        mine = range(start + rank * micro, start + (rank + 1) * micro)
        picked = [(i, *blocks[i]) for i in mine if i < len(blocks)]
        if picked:
            yield collate(picked)
        else:
            empty = collate([(0, *blocks[0])])
            yield MicroBatch(empty.inputs, torch.full_like(empty.labels, IGNORE))
