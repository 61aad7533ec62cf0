"""Blocks of whole documents: each is put where it fits best, none is cut that fits into a block, the rest is padding.

For conversations, of which a second half without the first says little. Within chunks of documents the longest come
first and each goes into the fullest block that still takes it (best-fit decreasing), which leaves a few per cent empty
where documents are well below a block. Longer ones than a block are cut into pieces of one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.blocks import Block
from gqa_convert.data.conversations import UNSCORED
from gqa_convert.data.encoding import Ids
from gqa_convert.data.store import TokenStore
from gqa_convert.errors import UsageError

CHUNK = 1024
"""Documents that are packed together; they are neighbours in an order that is drawn anew each epoch."""
_KEPT = 3

Piece = tuple[int, int, int]
"""Document, first token, tokens."""


def pack(sizes: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Put documents of these sizes into as few bins of `capacity` tokens as best-fit decreasing needs.

    Every token is in one bin. The same sizes give the same bins.
    """
    pieces = [
        (document, start, min(capacity, size - start))
        for document, size in enumerate(sizes)
        for start in range(0, size, capacity)
    ]
    pieces.sort(key=lambda piece: -piece[2])
    bins: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # what is left in each bin that is not full, ascending
    for piece in pieces:
        place = bisect_left(room, (piece[2], -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(piece)
        if left > piece[2]:
            insort(room, (left - piece[2], number))
    return bins


def filled(parts: Sequence[Ids], size: int) -> Block:
    """A block of `size` tokens that holds these documents; what is left is a document of padding, never predicted."""
    ids = np.full(size, UNSCORED, np.int64)
    documents = np.full(size, len(parts), np.int64)
    place = 0
    for number, part in enumerate(parts):
        ids[place : place + len(part)] = part
        documents[place : place + len(part)] = number
        place += len(part)
    return Block(ids, documents)


@dataclass(frozen=True)
class _Epoch:
    """The bins of an epoch: pieces of bin b are those from `bounds[b]` to `bounds[b + 1]`."""

    pieces: NDArray[np.int64]
    bounds: NDArray[np.int64]
    order: NDArray[np.int64]


class PackedBlocks:
    """Blocks of whole documents of a token store, at random access.

    Args:
        store: the documents.
        length: tokens a block (its last label comes on top, and is not the next block's first token).
        seed: of the order; None keeps documents as they are.

    Raises:
        UsageError: if the store is empty.
    """

    def __init__(self, store: TokenStore, length: int, *, seed: int | None) -> None:
        if store.total == 0:
            raise UsageError("data: no tokens to train on (is every document held out, or empty?).")
        self._store, self._size, self._seed = store, length + 1, seed
        self._sizes = np.diff(store.starts)
        self._ends: list[int] = []
        self._epochs: dict[int, _Epoch] = {}

    def get(self, index: int) -> Block:
        """Return block `index` of the training order."""
        epoch = 0
        while self._end(epoch) <= index:
            epoch += 1
        bins = self._bins(epoch)
        number = int(bins.order[index - (self._ends[epoch - 1] if epoch else 0)])
        pieces = bins.pieces[bins.bounds[number] : bins.bounds[number + 1]]
        starts = self._store.starts[pieces[:, 0]] + pieces[:, 1]
        return filled(
            [
                self._store.tokens[start : start + count].astype(np.int64)
                for start, count in zip(starts.tolist(), pieces[:, 2].tolist(), strict=True)
            ],
            self._size,
        )

    def epoch_blocks(self) -> int:
        """Blocks of the first epoch; later ones have about as many."""
        return self._end(0)

    @property
    def padding(self) -> float:
        """Share of the first epoch's blocks that holds nothing."""
        return 1.0 - self._store.total / (self.epoch_blocks() * self._size)

    def _end(self, epoch: int) -> int:
        """How many blocks the epochs up to this one have."""
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._bins(len(self._ends)).order))
        return self._ends[epoch]

    def _bins(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= _KEPT:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._packed(epoch)
        return self._epochs[epoch]

    def _packed(self, epoch: int) -> _Epoch:
        count = self._store.documents
        draw = None if self._seed is None else np.random.default_rng([self._seed, 0, epoch])
        documents = np.arange(count) if draw is None else draw.permutation(count)
        pieces: list[NDArray[np.int64]] = []
        counts: list[int] = []
        for first in range(0, count, CHUNK):
            chunk = documents[first : first + CHUNK]
            for one in pack(self._sizes[chunk].tolist(), self._size):
                rows = np.array(one, dtype=np.int64)
                rows[:, 0] = chunk[rows[:, 0]]
                pieces.append(rows)
                counts.append(len(rows))
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        order = np.arange(len(counts)) if draw is None else draw.permutation(len(counts))
        return _Epoch(np.concatenate(pieces), bounds, order)


def held_out_packed(store: TokenStore, length: int, limit: int | None) -> list[tuple[Block, int]]:
    """Whole documents of a held-out store, in blocks, once; as `gqa_convert.data.blocks.held_out_blocks` gives them.

    Raises:
        UsageError: if the store has fewer than two tokens.
    """
    if store.total < 2:
        raise UsageError("data.held_out: fewer than two tokens are held out. Raise its fraction, or give it paths.")
    blocks = PackedBlocks(store, length, seed=None)
    count = blocks.epoch_blocks()
    if limit is not None:
        count = min(count, -(-limit // length))
    return [(blocks.get(index), length + 1) for index in range(count)]
