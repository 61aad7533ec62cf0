"""Token blocks packed without waste: documents end to end, cut every `length` tokens, nothing dropped or padded.

Block b covers `length + 1` tokens, the last of which is the first of block b + 1: it is the label of the last
position, so every token but the very first is predicted exactly once. Epochs follow each other without a seam.

Order: documents are permuted anew each epoch, and blocks within windows, so that the blocks of one long document do
not fill a batch. Both are functions of (seed, epoch or window), so a position in the data is one integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.encoding import Ids
from gqa_convert.data.store import TokenStore
from gqa_convert.errors import UsageError

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Block:
    """`length + 1` token ids, and for each the number of its document (only changes of it mean something)."""

    ids: Ids
    documents: NDArray[np.int64]


class Blocks(Protocol):
    """A sequence of blocks without end."""

    def get(self, index: int) -> Block:
        """Return block `index`."""
        ...


def shuffled_index(index: int, *, seed: int, window: int) -> int:
    """Where block `index` of the training order lies in the packed order: permuted within its window."""
    if window <= 1:
        return index
    number, offset = divmod(index, window)
    return number * window + int(_window_order(seed, number, window)[offset])


@lru_cache(maxsize=8)
def _window_order(seed: int, number: int, window: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1, number]).permutation(window)


class StoredBlocks:
    """Blocks of a token store, at random access.

    Args:
        store: the documents.
        length: tokens a block (its last label comes on top).
        seed: of the order; None keeps documents and blocks as they are.
        window: blocks that are permuted together.

    Raises:
        UsageError: if the store is empty.
    """

    def __init__(self, store: TokenStore, length: int, *, seed: int | None, window: int = DEFAULT_WINDOW) -> None:
        if store.total == 0:
            raise UsageError("data: no tokens to train on (is every document held out, or empty?).")
        self._store, self._length, self._seed, self._window = store, length, seed, window
        self._sizes = np.diff(store.starts)
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def get(self, index: int) -> Block:
        """Return block `index` of the training order."""
        if self._seed is not None:
            index = shuffled_index(index, seed=self._seed, window=self._window)
        return self._read(index * self._length, self._length + 1)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents of an epoch in order, and where in the epoch each one ends."""
        if epoch not in self._epochs:
            count = self._store.documents
            if self._seed is None:
                order = np.arange(count)
            else:
                order = np.random.default_rng([self._seed, 0, epoch]).permutation(count)
            # A block may straddle two epochs, and a window more; older ones are not asked for again.
            while len(self._epochs) >= 3:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = (order, np.cumsum(self._sizes[order]))
        return self._epochs[epoch]

    def _read(self, start: int, count: int) -> Block:
        ids = np.empty(count, np.int64)
        documents = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(start + filled, self._store.total)
            order, ends = self._order(epoch)
            slot = int(np.searchsorted(ends, offset, side="right"))
            while filled < count and slot < len(order):
                document = int(order[slot])
                size = int(self._sizes[document])
                inside = offset - (int(ends[slot]) - size)
                take = min(size - inside, count - filled)
                first = int(self._store.starts[document]) + inside
                ids[filled : filled + take] = self._store.tokens[first : first + take]
                documents[filled : filled + take] = epoch * len(order) + slot
                filled += take
                offset += take
                slot += 1
        return Block(ids, documents)


def held_out_blocks(store: TokenStore, length: int, limit: int | None) -> list[tuple[Block, int]]:
    """Cut a store into blocks in order, once; each with its number of real tokens (the last one is padded with 0).

    Args:
        store: the held-out documents.
        length: tokens a block.
        limit: stop after this many tokens; None for all.

    Raises:
        UsageError: if the store has fewer than two tokens.
    """
    if store.total < 2:
        raise UsageError("data.held_out: fewer than two tokens are held out. Raise its fraction, or give it paths.")
    blocks = StoredBlocks(store, length, seed=None)
    last = store.total - 1 if limit is None else min(store.total - 1, max(limit, 1))
    padded = []
    for index in range(-(-last // length)):
        real = min(length + 1, store.total - index * length)
        block = blocks.get(index)
        ids = np.where(np.arange(length + 1) < real, block.ids, 0)
        padded.append((Block(ids, block.documents), real))
    return padded
