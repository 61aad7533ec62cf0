"""Tokenised corpora: found where an earlier run left them, or made now."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.data.conversations import UNSCORED, Conversation
from gqa_convert.data.documents import Corpus
from gqa_convert.data.encoding import Encoder
from gqa_convert.data.split import is_held_out
from gqa_convert.data.store import StoreWriter, TokenStore
from gqa_convert.errors import Preempted
from gqa_convert.uptrain.tokenising import parts_folder, tokenised

Tell = Callable[[str], None]
Stopped = Callable[[], bool]

_SAY_EVERY = 30.0
"""Seconds between words on how far tokenising has come."""


@dataclass(frozen=True)
class Making:
    """Tokenised corpora in `root`.

    Attributes:
        root: folder of the stores.
        encoder: of the run's model.
        tell: told of long work.
        stopped: asked now and then; True ends the work.
        check: read stores that are there once, to make sure that they are whole.
        processes: that tokenise.
    """

    root: Path
    encoder: Encoder
    tell: Tell
    stopped: Stopped
    check: bool
    processes: int = 1

    def both(self, corpus: Corpus, fraction: float) -> tuple[TokenStore, TokenStore]:
        """The training and held-out stores of a corpus."""
        key = self._key(corpus, fraction=fraction)
        names = (f"{key}-train", f"{key}-held-out")
        train, held = (self._opened(name) for name in names)
        if train is not None and held is not None:
            return train, held
        self.tell("tokenising the corpus")
        said, characters = time.monotonic(), 0

        def done(count: int) -> None:
            nonlocal said, characters
            characters += count
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                self.tell(f"tokenising the corpus: {characters / 1e6:,.0f} million characters")

        with parts_folder(self.root / key) as folder, self._writing(corpus, *names) as writers:
            rows = tokenised(
                corpus,
                self.encoder,
                folder,
                fraction=fraction,
                processes=self.processes,
                stopped=self._heed,
                done=done,
            )
            for ids, held_out in rows:
                writers[held_out].add(ids)
            self.tell(f"tokenised: {writers[0].total:,} tokens to train on, {writers[1].total:,} held out")
            return writers[0].commit({}), writers[1].commit({})

    def evaluation(self, corpus: Corpus, fraction: float | None, limit: int | None) -> TokenStore:
        """Documents to evaluate on alone, until there are `limit` tokens.

        Args:
            corpus: the documents.
            fraction: take those that are held out of it; None for all of them.
            limit: of tokens; None for no limit.
        """
        key = self._key(corpus, fraction=1.0 if fraction is None else fraction, limit=limit)
        kept = self._opened(f"{key}-evaluation")
        if kept is not None:
            return kept
        self.tell("collecting held-out documents")
        with self._writing(corpus, f"{key}-evaluation") as writers:
            texts = self._heeding(corpus.all_documents())
            wanted = (text for text in texts if fraction is None or is_held_out(text, fraction))
            for ids in self.encoder.stream(wanted):
                writers[0].add(ids)
                if limit is not None and writers[0].total > limit:
                    break
            return writers[0].commit({})

    def _key(self, corpus: Corpus, **more: Any) -> str:
        described = {"source": repr(corpus.spec), "files": corpus.identity, **self.encoder.identity(), **more}
        return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _opened(self, name: str) -> TokenStore | None:
        store = TokenStore.open(self.root / name, check=self.check, tell=self.tell)
        if store is not None:
            self.encoder.check_known(store.largest)
        return store

    def _heeding(self, texts: Iterator[str]) -> Iterator[str]:
        """The same texts, until somebody asks to stop."""
        for text in texts:
            self._heed()
            yield text

    def _heed(self) -> None:
        if self.stopped():
            raise Preempted("stopped while reading the text, before training. Run the same command again to start.")

    @contextmanager
    def _writing(self, corpus: Corpus, *names: str) -> Iterator[list[StoreWriter]]:
        """Writers of stores; what they wrote is removed if anything goes wrong before it is committed."""
        largest = 2 * UNSCORED if isinstance(corpus.first(), Conversation) else self.encoder.vocabulary
        writers: list[StoreWriter] = []
        try:
            for name in names:
                writers.append(StoreWriter(self.root / name, largest))
            yield writers
        except BaseException:
            for writer in writers:
                writer.discard()
            raise
