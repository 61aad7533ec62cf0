"""Documents tokenised in parts, by several processes, each part a file: what a killed run has done is not done again.

One process reads; it knows where in the corpus each part begins, so reading goes on there too. The parts lie beside the
store that they are for, under its name, and go when it is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.documents import Corpus, ShardReader
from gqa_convert.data.encoding import Encoder
from gqa_convert.data.split import is_held_out
from gqa_convert.data.store import clear_errors
from gqa_convert.errors import GQAConvertError, UsageError

PART_CHARACTERS = 1 << 21
"""Characters of text of a part."""
_WORTH_IT = 2
"""Parts that must be left for other processes to be started, which takes a second or two."""
_BATCH = 256
_MOST = 8

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Position:
    """A place in a corpus: between two documents, or between two shards (`state` None)."""

    shard: int = 0
    state: dict[str, Any] | None = None


def usable_processes() -> int:
    """Processes that tokenising may use unless it is told: as many as there are processors for, eight at most."""
    return max(1, min(_MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


@contextmanager
def parts_folder(beside: Path) -> Iterator[Path]:
    """A folder for the parts of a store, this process's alone; kept if it is left by an error, removed otherwise."""
    with clear_errors(beside):
        folder, lock = _held(beside)
    finished = False
    try:
        yield folder
        finished = True
    finally:
        if finished or not any(folder.glob("part-*.npz")):
            shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _held(beside: Path) -> tuple[Path, Any]:
    """The folder and its open lock."""
    folder = beside.with_name(f"{beside.name}-parts")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")  # noqa: SIM115 - held until the end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another run makes the same store: each works for itself
        lock.close()
        folder = beside.with_name(f"{beside.name}-parts-{os.getpid()}")
        folder.mkdir(exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError:
        pass  # some network file systems know no locks
    return folder, lock


def tokenised(
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    *,
    fraction: float,
    processes: int,
    stopped: Callable[[], None] = lambda: None,
    done: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Ids, bool]]:
    """Yield the tokens of every document that has any, in order, and whether it is held out.

    Args:
        corpus: the documents.
        encoder: makes them tokens.
        folder: of the parts; those that are there are read and not made again.
        fraction: share of documents that is held out.
        processes: that tokenise.
        stopped: called now and then; raises to end the work.
        done: told of the characters of each part that is made.

    Raises:
        GQAConvertError: whatever is wrong with corpus or text.
    """
    for number in _made(corpus, encoder, folder, fraction, processes, stopped, done):
        yield from _documents(_path(folder, number))


def _made(
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    fraction: float,
    processes: int,
    stopped: Callable[[], None],
    done: Callable[[int], None],
) -> Iterator[int]:
    """Make every part; yields the number of each, in order, when it is there."""
    first, position = _finished(folder)
    yield from range(first)
    pool: ProcessPoolExecutor | None = None
    waiting: deque[tuple[int, int, Future[None]]] = deque()
    processes = processes if _travels(encoder) else 1

    def finished() -> int:
        number, size, future = waiting.popleft()
        future.result()
        done(size)
        return number

    def submitted(number: int, texts: list[str], after: Position) -> None:
        assert pool is not None
        future = pool.submit(_make_there, _path(folder, number), texts, after, fraction)
        waiting.append((number, sum(map(len, texts)), future))

    try:
        parts = enumerate(_with_more(_parts(corpus, position, stopped)), start=first)
        for number, (texts, after, more) in parts:
            if pool is not None:
                submitted(number, texts, after)
                # As many more as there are processes lie ready; the text of no more is in memory.
                while len(waiting) > 2 * processes:
                    yield finished()
                continue
            if processes > 1 and more >= _WORTH_IT:
                pool = _pool(encoder, processes)  # they start while this process makes a part, and find work then
                for later, (texts_then, after_then, _) in islice(parts, _WORTH_IT):
                    submitted(later, texts_then, after_then)
            _make(encoder, _path(folder, number), texts, after, fraction)
            done(sum(map(len, texts)))
            yield number
        while waiting:
            yield finished()
    except BrokenProcessPool as error:
        raise UsageError(
            "data.processes: a process that tokenises was killed, for want of memory perhaps. Run again to go on, with "
            "data.processes=1 if it happens again."
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _with_more(parts: Iterator[tuple[list[str], Position]]) -> Iterator[tuple[list[str], Position, int]]:
    """Each part, and how many more there are at least; `_WORTH_IT` is as far as it looks."""
    ahead: deque[tuple[list[str], Position]] = deque()
    for part in parts:
        ahead.append(part)
        if len(ahead) > _WORTH_IT:
            yield *ahead.popleft(), _WORTH_IT
    while ahead:
        yield *ahead.popleft(), len(ahead)


def _parts(corpus: Corpus, position: Position, stopped: Callable[[], None]) -> Iterator[tuple[list[str], Position]]:
    """The documents of one part after the other, each with the position behind it."""
    texts: list[str] = []
    size = 0
    for shard in range(position.shard, len(corpus.shards)):
        reader: ShardReader = corpus.read(shard, position.state if shard == position.shard else None)
        for text in reader:
            stopped()
            texts.append(text)
            size += len(text)
            if size >= PART_CHARACTERS:
                yield texts, Position(shard, reader.state())
                texts, size = [], 0
    if texts:
        yield texts, Position(len(corpus.shards))


def _finished(folder: Path) -> tuple[int, Position]:
    """How many parts from the first on are there, and where the next one begins."""
    number, position = 0, Position()
    while True:
        try:
            with np.load(_path(folder, number), allow_pickle=False) as part:
                after = json.loads(str(part["after"]))
                _ = part["starts"], part["held_out"]
            position = Position(int(after["shard"]), after["state"])
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return number, position
        except Exception:  # a damaged archive raises what its parts come to: it is made again
            return number, position
        number += 1


def _path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.npz"


def _make(encoder: Encoder, path: Path, texts: list[str], after: Position, fraction: float) -> None:
    """Tokenise a part and write its file, whole under its name."""
    encoded: list[Ids] = []
    for start in range(0, len(texts), _BATCH):
        encoded += encoder.encode(texts[start : start + _BATCH])
    held_out = np.array([is_held_out(text, fraction) for text in texts], dtype=bool)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])]).astype(np.int64)
    tokens = np.concatenate(encoded) if encoded else np.zeros(0, np.int64)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with clear_errors(path):
        with open(beside, "wb") as file:
            np.savez(
                file,
                tokens=tokens.astype(np.uint32),
                starts=starts,
                held_out=held_out,
                after=json.dumps({"shard": after.shard, "state": after.state}),
            )
        os.replace(beside, path)


def _documents(path: Path) -> Iterator[tuple[Ids, bool]]:
    with np.load(path, allow_pickle=False) as part:
        tokens, starts, held_out = part["tokens"].astype(np.int64), part["starts"], part["held_out"]
    for document, held in enumerate(held_out.tolist()):
        ids = tokens[starts[document] : starts[document + 1]]
        if len(ids):
            yield ids, held


_encoder: Encoder | None = None
"""In a process that tokenises for another."""


def _travels(encoder: Encoder) -> bool:
    """Whether other processes can be given the encoder (a tokenizer of a model's own code may not be)."""
    try:
        return bool(pickle.dumps(encoder)) and "transformers_modules" not in type(encoder.tokenizer).__module__
    except Exception:  # whatever an object says that cannot be pickled
        return False


def _pool(encoder: Encoder, processes: int) -> ProcessPoolExecutor:
    import multiprocessing

    # Torch has threads by now, which a fork would leave behind in a state of their own.
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(encoder, os.getpid()),
    )
    with _nameless_main():
        pool.submit(os.getpid)  # starts them all
    return pool


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Keep new processes from running the user's script again, which they would to have its functions."""
    main = sys.modules["__main__"]
    kept: dict[str, object] = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__dict__.pop("__file__", None)
    main.__dict__["__spec__"] = None
    try:
        yield
    finally:
        main.__dict__.update(kept)


def _start(encoder: Encoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A process whose parent was killed waits for work for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _make_there(path: Path, texts: list[str], after: Position, fraction: float) -> None:
    assert _encoder is not None
    try:
        _make(_encoder, path, texts, after, fraction)
    except GQAConvertError as error:
        with suppress(AttributeError):
            error.__cause__ = None  # what it came from may not travel between processes
        raise
