"""Blocks from a corpus that is too large to tokenise beforehand: read, tokenised and packed as training goes.

Shards are permuted anew each epoch and read in order; packed blocks are permuted within windows. The state is where
a window starts (epoch, shard, the shard's own position, tokens carried over): resuming reads one window again at most,
never the stream from its beginning.
"""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import Any

import numpy as np

from gqa_convert.data.blocks import DEFAULT_WINDOW, Block, shuffled_index
from gqa_convert.data.documents import Corpus, ShardReader
from gqa_convert.data.encoding import Encoder, Ids
from gqa_convert.data.packing import filled, pack
from gqa_convert.data.split import is_held_out
from gqa_convert.errors import CheckpointError, UsageError

_BATCH = 64
_KEPT_STATES = 4


class StreamedBlocks:
    """Blocks of a corpus in one pass after another. `get` goes forwards, or back within the present window.

    Args:
        corpus: the documents.
        encoder: makes them token ids.
        length: tokens a block.
        seed: of the order; None keeps shards and blocks as they are.
        window: blocks that are held in memory and permuted together.
        held_out: fraction of documents to leave out.
        whole: keep documents whole, as `gqa_convert.data.packing` does, over the few that are read at a time.
        state: from `state`, to go on from there.

    Raises:
        UsageError: if the corpus is not that of `state`.
        CheckpointError: if `state` is no such state.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        length: int,
        *,
        seed: int | None,
        window: int = DEFAULT_WINDOW,
        held_out: float = 0.0,
        whole: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._corpus, self._encoder, self._length = corpus, encoder, length
        self._seed, self._window, self._held_out = seed, window, held_out
        # Blocks of whole documents share no token with the next one.
        self._whole, self._stride = whole, length + 1 if whole else length
        self._states: dict[int, dict[str, Any]] = {}
        self._number = -1
        self._blocks: list[Block] = []
        self._digests: dict[int, str] = {}
        self._expected: str | None = None
        start: dict[str, Any] = {"window": 0, "epoch": 0, "slot": 0, "shard": None, "ids": [], "documents": []}
        try:
            self._restore(state or start)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise CheckpointError(
                "data: the checkpoint does not say where in the corpus it was "
                f"({type(error).__name__}: {error}). Resume from another checkpoint."
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        before, now = state.get("shards"), len(self._corpus.shards)
        if before is not None and before != now:
            raise UsageError(
                f"data: the corpus had {before:,} shards when the checkpoint was written and has {now:,} now, so the "
                "place in it is lost. Put the files back, name the hub dataset's revision, or choose another output."
            )
        _check_contents(state.get("contents"), self._corpus.contents)
        self._expected = state.get("digest")
        self._next = int(state["window"])
        self._epoch, self._slot = int(state["epoch"]), int(state["slot"])
        self._ids = [np.asarray(state["ids"], np.int64)]
        self._documents = [np.asarray(state["documents"], np.int64)]
        self._held = len(state["ids"])
        self._document = int(state["documents"][-1]) if state["documents"] else -1
        self._reader: ShardReader | None = None
        if state["shard"] is not None:
            self._reader = self._corpus.read(self._shard_order()[self._slot], state["shard"])
        self._start = {key: value for key, value in state.items() if key not in ("digest", "contents", "shards")}

    def state(self, index: int) -> dict[str, Any]:
        """What to keep so that a later run can go on with block `index`. JSON-ready.

        Raises:
            KeyError: if the block's window was passed long ago.
        """
        number = index // self._window
        start = self._start if number == self._next and number not in self._states else self._states[number]
        digest = {"digest": self._digests[number]} if number in self._digests else {}
        return {**start, **digest, "shards": len(self._corpus.shards), "contents": self._corpus.contents}

    def get(self, index: int) -> Block:
        """Return block `index` of the training order.

        Raises:
            ValueError: for a block before the present window.
        """
        number, _ = divmod(index, self._window)
        if number < self._number or (number < self._next and number != self._number):
            raise ValueError(f"block {index} lies before the present window of the stream")
        while self._number < number:
            self._fill()
        if self._seed is not None:
            index = shuffled_index(index, seed=self._seed, window=self._window)
        return self._blocks[index % self._window]

    def _shard_order(self) -> list[int]:
        count = len(self._corpus.shards)
        if self._seed is None:
            return list(range(count))
        return [int(i) for i in np.random.default_rng([self._seed, 0, self._epoch]).permutation(count)]

    def _fill(self) -> None:
        """Read the next window."""
        self._number = self._next
        self._states[self._number] = self._start
        for old in sorted(self._states)[:-_KEPT_STATES]:
            del self._states[old]
            self._digests.pop(old, None)
        need = self._window * self._stride + (not self._whole)
        while self._held < need:
            self._read_some()
        ids, documents = np.concatenate(self._ids), np.concatenate(self._documents)
        self._digests[self._number] = hashlib.blake2b(ids[:need].tobytes(), digest_size=16).hexdigest()
        if self._expected not in (None, self._digests[self._number]):
            raise _other_text("it gives other tokens at the place that was reached")
        self._expected = None
        self._blocks = [
            Block(ids[i : i + self._length + 1], documents[i : i + self._length + 1])
            for i in range(0, self._window * self._stride, self._stride)
        ]
        # Slices of these keep the whole window alive; what is carried over gets memory of its own.
        rest = self._window * self._stride
        self._ids, self._documents = [ids[rest:].copy()], [documents[rest:].copy()]
        self._held = len(self._ids[0])
        self._next = self._number + 1
        self._start = {
            "window": self._next,
            "epoch": self._epoch,
            "slot": self._slot,
            "shard": None if self._reader is None else self._reader.state(),
            "ids": self._ids[0].tolist(),
            "documents": self._documents[0].tolist(),
        }

    def _read_some(self) -> None:
        """Append a few documents' tokens, moving on to the next shard or epoch where one ends."""
        if self._reader is None:
            self._reader = self._corpus.read(self._shard_order()[self._slot])
        texts = list(islice(self._reader, _BATCH))
        kept = [text for text in texts if not is_held_out(text, self._held_out)]
        encoded = self._encoder.encode(kept) if kept else []
        for ids in self._packed(encoded) if self._whole else encoded:
            self._document += 1
            self._ids.append(ids)
            self._documents.append(np.full(len(ids), self._document))
            self._held += len(ids)
        if len(texts) == _BATCH:
            return
        self._reader = None
        self._slot += 1
        if self._slot == len(self._corpus.shards):
            self._slot = 0
            self._epoch += 1
            if not self._held and self._epoch > 1:
                raise UsageError("data: a whole pass over the corpus gave no tokens to train on.")

    def _packed(self, encoded: list[Ids]) -> list[Ids]:
        """These documents, or pieces of them, in the order of the blocks they fill; what is left of each is padded."""
        runs: list[Ids] = []
        for pieces in pack([len(ids) for ids in encoded], self._stride):
            parts = [encoded[document][start : start + count] for document, start, count in pieces]
            block = filled(parts, self._stride)
            runs += [block.ids[block.documents == number] for number in range(int(block.documents[-1]) + 1)]
        return runs


def _check_contents(before: Any, now: list[list[Any]]) -> None:
    """Refuse files that are not those of a checkpoint. Where they lie and what they are called does not matter."""
    if not isinstance(before, list):
        return  # of a version that did not say
    changed = [new[0] for old, new in zip(before, now, strict=False) if list(old)[1:] != new[1:]]
    if changed:
        raise _other_text(f"{changed[0]} has changed")


def _other_text(what: str) -> UsageError:
    return UsageError(
        f"data: the text to train on is not what it was when the checkpoint was written: {what}. Put the files back as "
        "they were, or choose another output."
    )
