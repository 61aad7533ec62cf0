"""Tokens on disk: one flat file that is mapped into memory, and where each document starts.

A store is written beside its final name and renamed, its description last, so a store that can be opened is whole.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.encoding import Ids
from gqa_convert.errors import UsageError

_META = "store.json"
_FORMAT = 1


@dataclass(frozen=True)
class TokenStore:
    """Documents as token ids. `starts[i]` to `starts[i + 1]` are the tokens of document i."""

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    meta: dict[str, Any]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    @property
    def total(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    @classmethod
    def open(cls, folder: Path) -> TokenStore | None:
        """Open a store; None if there is no whole one."""
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            starts = np.load(folder / "starts.npy")
            tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r") if starts[-1] else np.zeros(0)
        except (OSError, ValueError):
            return None
        if meta.get("format") != _FORMAT or len(tokens) != starts[-1]:
            return None
        return cls(tokens, starts, meta)

    @classmethod
    def of(cls, documents: Iterable[Ids]) -> TokenStore:
        """A store in memory."""
        rows = [np.asarray(row, dtype=np.int64) for row in documents]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return cls(np.concatenate(rows) if rows else np.zeros(0, np.int64), starts, {})


class StoreWriter:
    """Writes a store document by document; `commit` makes it appear, `discard` removes what was written."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self._target = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._stage = folder.with_name(f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        self._stage.mkdir()
        self._dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        self._file = open(self._stage / "tokens.bin", "wb", buffering=1 << 20)  # noqa: SIM115 - closed by commit
        self._lengths: list[int] = []
        self.total = 0

    def add(self, ids: Ids) -> None:
        """Append a document."""
        self._file.write(ids.astype(self._dtype).tobytes())
        self._lengths.append(len(ids))
        self.total += len(ids)

    def commit(self, meta: dict[str, Any]) -> TokenStore:
        """Finish the store and open it; another process that was faster wins."""
        _close(self._file)
        starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        np.save(self._stage / "starts.npy", starts)
        described = {"format": _FORMAT, "dtype": self._dtype.name, "tokens": self.total, **meta}
        (self._stage / _META).write_text(json.dumps(described, indent=2), encoding="utf-8")
        try:
            os.rename(self._stage, self._target)
        except OSError:
            if TokenStore.open(self._target) is None:
                shutil.rmtree(self._target, ignore_errors=True)
                os.rename(self._stage, self._target)
            else:
                shutil.rmtree(self._stage, ignore_errors=True)
        store = TokenStore.open(self._target)
        if store is None:
            raise UsageError(f"{self._target}: the token store just written cannot be read back.")
        return store

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        shutil.rmtree(self._stage, ignore_errors=True)


def _close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
