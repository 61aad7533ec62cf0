"""Tokens on disk: one flat file that is mapped into memory, and where each document starts.

A store is written beside its final name and renamed, its description last, so a store that can be opened is whole. The
description holds checksums of both files; a store with a single changed bit counts as absent.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.conversations import TOKEN
from gqa_convert.data.encoding import Ids
from gqa_convert.errors import OutputError, UsageError

_META, _TOKENS, _STARTS = "store.json", "tokens.bin", "starts.bin"
_FORMAT = 2
_CHUNK = 1 << 26
"""Bytes of `tokens.bin` under one checksum: large stores are checked by several threads."""
_READERS = 8
_DTYPES = ("uint16", "uint32")
_LONGEST_META = 1 << 26
_STAGE = re.compile(r"\.[0-9a-f]{16}-[a-z-]+\.tmp-\d+-[0-9a-f]{8}")
"""Stages of stores named `<16 hex digits>-<what>`, as the corpus names them; nothing else is ever removed."""
_TRIES = 20


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

    @property
    def digest(self) -> str | None:
        """What tells these tokens from any others, in this order; None for a store in memory."""
        return self.meta.get("digest")

    @property
    def largest(self) -> int | None:
        """The largest token id; None for a store in memory or an empty one."""
        return self.meta.get("largest")

    @classmethod
    def open(
        cls, folder: Path, *, check: bool = True, tell: Callable[[str], None] = lambda _: None
    ) -> TokenStore | None:
        """Open a store; None if there is no whole one.

        Args:
            folder: where it is.
            check: read every byte and compare checksums. Without, sizes must do.
            tell: told of a store that is there but damaged.
        """
        try:
            if any(path.exists() and not path.is_file() for path in map(folder.joinpath, (_META, _TOKENS, _STARTS))):
                raise ValueError("a part of it is no file")
            meta = _description(folder)
            starts = np.fromfile(folder / _STARTS, dtype=np.int64)
            size = (folder / _TOKENS).stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            tell(f"{folder}: the token store is damaged ({' '.join(str(error).split())[:100]})")
            return None
        dtype = np.dtype(meta["dtype"])
        problem = None
        if meta["format"] != _FORMAT:
            return None
        if not len(starts) or size != int(starts[-1]) * dtype.itemsize or int(starts[-1]) != meta["tokens"]:
            problem = "its sizes contradict each other"
        elif hashlib.sha256(starts.tobytes()).hexdigest() != meta["starts_sha256"]:
            problem = f"{_STARTS} has changed since it was written"
        elif check and _chunk_digests(folder / _TOKENS, size) != meta["chunks_sha256"]:
            problem = f"{_TOKENS} has changed since it was written"
        if problem is not None:
            tell(f"{folder}: the token store is damaged ({problem})")
            return None
        tokens = np.memmap(folder / _TOKENS, dtype=dtype, mode="r") if size else np.zeros(0, dtype)
        return cls(tokens, starts, meta)

    @classmethod
    def of(cls, documents: Iterable[Ids]) -> TokenStore:
        """A store in memory."""
        rows = [np.asarray(row, dtype=np.int64) for row in documents]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return cls(np.concatenate(rows) if rows else np.zeros(0, np.int64), starts, {})


class StoreWriter:
    """Writes a store document by document; `commit` makes it appear, `discard` removes what was written.

    What killed writers left beside it is removed first: a writer holds a lock, which goes with its process.

    Raises:
        OutputError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self._target = folder
        with clear_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(folder.parent)
            self._stage, self._file = _make_stage(folder)
        self._dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        self._lengths: list[int] = []
        self._chunks: list[str] = []
        self._chunk, self._filled = hashlib.sha256(), 0
        self._largest: int | None = None
        self.total = 0

    def add(self, ids: Ids) -> None:
        """Append a document.

        Raises:
            UsageError: if an id is larger than the vocabulary that the store was made for.
            OutputError: if it cannot be written.
        """
        if len(ids) and int(ids.max()) > int(np.iinfo(np.dtype(self._dtype)).max):  # type: ignore[type-var]
            raise UsageError(
                "data: a source holds rows of text and, further on, rows of messages. Make them sources of their own."
            )
        data = ids.astype(self._dtype).tobytes()
        with clear_errors(self._target):
            self._file.write(data)
        self._lengths.append(len(ids))
        self.total += len(ids)
        if len(ids):
            self._largest = max(self._largest or 0, int((ids & TOKEN).max()))
        while data:
            part, data = data[: _CHUNK - self._filled], data[_CHUNK - self._filled :]
            self._chunk.update(part)
            self._filled += len(part)
            if self._filled == _CHUNK:
                self._end_chunk()

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk, self._filled = hashlib.sha256(), 0

    def commit(self, meta: dict[str, Any]) -> TokenStore:
        """Finish the store and open it; another process that was faster wins.

        Raises:
            OutputError: if it cannot be written.
        """
        if self._filled:
            self._end_chunk()
        starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        digest = hashlib.sha256(starts.tobytes()).hexdigest()
        described = {
            "format": _FORMAT,
            "dtype": self._dtype.name,
            "tokens": self.total,
            "largest": self._largest,
            "starts_sha256": digest,
            "chunks_sha256": self._chunks,
            "digest": hashlib.sha256(" ".join([self._dtype.name, digest, *self._chunks]).encode()).hexdigest(),
            **meta,
        }
        with clear_errors(self._target):
            self._file.flush()
            os.fsync(self._file.fileno())
            (self._stage / _STARTS).write_bytes(starts.tobytes())
            (self._stage / _META).write_text(json.dumps(described, indent=2), encoding="utf-8")
            try:
                os.rename(self._stage, self._target)
            except OSError:
                if TokenStore.open(self._target) is None:
                    shutil.rmtree(self._target, ignore_errors=True)
                    os.rename(self._stage, self._target)
                else:
                    shutil.rmtree(self._stage, ignore_errors=True)
            self._file.close()
        store = TokenStore.open(self._target, check=False)
        if store is None:
            raise UsageError(f"{self._target}: the token store just written cannot be read back.")
        return store

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError):  # what is still buffered has no room on a full disk
            self._file.close()
        shutil.rmtree(self._stage, ignore_errors=True)


def _make_stage(folder: Path) -> tuple[Path, Any]:
    """Make a folder to write in, with its locked file; made again if another run takes it for one left behind."""
    for attempt in range(_TRIES):
        stage = folder.with_name(f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        stage.mkdir()
        file: Any = None
        try:
            file = open(stage / _TOKENS, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by commit
            with suppress(OSError):  # some network file systems know no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (stage / _TOKENS).stat()
        except FileNotFoundError:
            if file is not None:
                file.close()
            if attempt + 1 == _TRIES:
                raise
        else:
            return stage, file
    raise AssertionError("the last try returns or raises")


def remove_stale(folder: Path) -> None:
    """Remove the unfinished stores that killed writers left in a folder."""
    with suppress(OSError):
        for stage in list(folder.iterdir()):
            if _STAGE.fullmatch(stage.name) and not stage.is_symlink() and _is_stale(stage):
                shutil.rmtree(stage, ignore_errors=True)


def _is_stale(stage: Path) -> bool:
    try:
        handle = os.open(stage / _TOKENS, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True  # killed just before the file was made; one that is about to make it begins anew
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def _description(folder: Path) -> dict[str, Any]:
    """Read `store.json`; a value of an unexpected kind is a KeyError, TypeError or ValueError."""
    with open(folder / _META, encoding="utf-8") as file:
        meta = json.loads(file.read(_LONGEST_META))
    if meta["dtype"] not in _DTYPES or not isinstance(meta["format"], int):
        raise ValueError(f"{_META} holds no description")
    if meta["format"] == _FORMAT:
        _ = meta["tokens"], meta["starts_sha256"], meta["chunks_sha256"], meta["digest"]
        if not isinstance(meta["digest"], str) or not isinstance(meta["largest"], (int, type(None))):
            raise ValueError(f"{_META} holds no description")
    return dict(meta)


def _chunk_digests(file: Path, size: int) -> list[str]:
    def digest(start: int) -> str:
        sha256 = hashlib.sha256()
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start)
            left = min(_CHUNK, size - start)
            while left and (part := stream.read(min(left, 1 << 20))):
                sha256.update(part)
                left -= len(part)
        return sha256.hexdigest()

    with ThreadPoolExecutor(_READERS, thread_name_prefix="tokens") as pool:
        return list(pool.map(digest, range(0, size, _CHUNK)))


@contextmanager
def clear_errors(folder: Path) -> Iterator[None]:
    """Say in one line what keeps tokens from being written.

    Raises:
        OutputError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else str(error.strerror or error)
        raise OutputError(
            f"{folder.parent}: tokens cannot be written there ({what}). Free some space, or choose another data.cache."
        ) from error
