"""Documents from files and hub ids, read as streams by `datasets`: always in the same order, resumable at any document.

A corpus is a list of shards (files). Shards are shuffled by us and never through a buffer: with a buffer, `datasets`
5.2 resumes by repeating some documents and losing others.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gqa_convert.data.complaints import complaint
from gqa_convert.data.conversations import Conversation, conversation
from gqa_convert.data.json_lines import JsonRows
from gqa_convert.errors import CheckpointError, GQAConvertError, HubError, UsageError

KINDS = ("text", "jsonl", "parquet", "folder", "hub", "python")
WHOLE = {"file": "document", "line": "line", "paragraph": "paragraph"}
_KINDS_BY_SUFFIX = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
KNOWN_SUFFIXES = tuple(_KINDS_BY_SUFFIX)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_EVERY_FILE = "**/*"
_WHOLE, _SAMPLES, _SAMPLE_BYTES = 1 << 20, 16, 1 << 14
_RETRY_SECONDS = (1.0, 4.0, 16.0, 64.0)

Shard = Callable[[], Any]
"""Opens one shard as an iterable with `state_dict` and `load_state_dict`."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where documents come from.

    Attributes:
        kind: one of `KINDS`. `folder` takes every file below a folder whose suffix is known (with a `pattern`, every
            file that matches: what is not known is text); `python` calls a function.
        paths: files and glob patterns; for `folder` the folder; for `hub` datasets' ids; for `python` `module:name`.
        text_field: the column that holds the text, or a conversation's messages.
        documents: how a text file is cut: `file`, `line`, `paragraph`, or a separator that stands between documents.
        pattern: which files of a folder.
        config_name: configuration of a hub dataset.
        split: split of a hub dataset.
        revision: branch, tag or commit of a hub dataset.
    """

    kind: str
    paths: tuple[str, ...]
    text_field: str = "text"
    documents: str = "file"
    pattern: str = _EVERY_FILE
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass
class Corpus:
    """Documents in shards. `identity` changes when the files do (names, sizes, times; not contents).

    `files` are the kind and path of each shard of a local source.
    """

    spec: SourceSpec
    shards: Sequence[Shard]
    identity: list[Any]
    files: Sequence[tuple[str, Path]] = ()
    remote: bool = False
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def read(self, shard: int, state: dict[str, Any] | None = None) -> ShardReader:
        """Start reading a shard, from `state` if given (see `ShardReader.state`)."""
        return ShardReader(self, shard, state)

    def first(self) -> str | None:
        """The first document; None if there is none."""
        return next(self.all_documents(), None)

    @cached_property
    def contents(self) -> list[list[Any]]:
        """Name, size and a digest of each local file's contents: of all of a small one, of samples of a large one."""
        return [[file.name, *_sampled(file)] for _, file in self.files]

    def all_documents(self) -> Iterator[str]:
        """Every document, shard after shard."""
        for shard in range(len(self.shards)):
            yield from self.read(shard)


def _sampled(file: Path) -> tuple[int, str]:
    """Size of a file, and a digest of pieces from all over it."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= _WHOLE:
            digest.update(stream.read())
        else:
            for number in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return size, digest.hexdigest()


class ShardReader:
    """An iterator over one shard's documents that can say where it is and survives a hub that is away for a while."""

    def __init__(self, corpus: Corpus, shard: int, state: dict[str, Any] | None = None) -> None:
        self._corpus = corpus
        self._shard = shard
        try:
            self._open(state)
        except GQAConvertError:
            raise
        except Exception as error:
            raise self._complaint(error) from error

    def _open(self, state: dict[str, Any] | None) -> None:
        self._data = self._corpus.shards[self._shard]()
        self._ready: list[str] = []
        self._pending = ""
        if state is not None:
            try:
                self._ready, self._pending = list(state["ready"]), str(state["pending"])
                self._data.load_state_dict(state["rows"])
            except Exception as error:
                raise CheckpointError(
                    "data: the place in the corpus that the checkpoint holds cannot be gone back to "
                    f"({type(error).__name__}). Resume from another checkpoint."
                ) from error
        self._rows = iter(self._data)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        waits = iter(_RETRY_SECONDS)
        while True:
            safe = self.state() if self._corpus.remote else None
            try:
                return self._next()
            except StopIteration:
                raise
            except GQAConvertError:
                raise
            except Exception as error:
                if safe is None or not _is_outage(error):
                    raise self._complaint(error) from error
                wait = next(waits, None)
                if wait is None:
                    raise HubError(
                        f"{', '.join(self._corpus.spec.paths)}: reading failed {len(_RETRY_SECONDS) + 1} times "
                        f"({type(error).__name__}: {error}). Run again to go on from the last checkpoint, or "
                        "download the data first and read it from disk."
                    ) from error
                self._corpus.sleep(wait)
                self._open(safe)

    def _next(self) -> str:
        while not self._ready:
            row = next(self._rows, None)
            if row is None:
                if not self._pending.strip():
                    raise StopIteration
                self._ready, self._pending = [self._pending.strip("\n")], ""
            else:
                self._take(_text_of(row, self._corpus.spec))
        return self._ready.pop(0)

    def _complaint(self, error: Exception) -> GQAConvertError:
        """What to say of a shard that cannot be read."""
        spec = self._corpus.spec
        if self._shard < len(self._corpus.files):
            kind, file = self._corpus.files[self._shard]
            return complaint(file, kind, error)
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if self._corpus.remote:
            return HubError(f"{', '.join(spec.paths)}: the dataset cannot be read ({words}).")
        return UsageError(f"data: {spec.paths[self._shard]}: the function failed{_last_line(error)} ({words}).")

    def _take(self, text: str) -> None:
        spec = self._corpus.spec
        if isinstance(text, Conversation) or spec.kind not in ("text", "folder") or spec.documents in WHOLE:
            self._ready = [text] if text else []
            return
        *done, self._pending = (self._pending + text).split(spec.documents)
        self._ready = [piece.strip("\n") for piece in done if piece.strip()]

    def state(self) -> dict[str, Any]:
        """Where the next document starts, JSON-ready."""
        return {"rows": self._data.state_dict(), "ready": list(self._ready), "pending": self._pending}


def _text_of(row: dict[str, Any], spec: SourceSpec) -> str:
    column = "text" if spec.kind in ("text", "python") else spec.text_field
    value = row.get(column)
    if isinstance(value, Conversation):
        return value
    try:
        said = conversation(row, column)
    except ValueError as error:
        raise UsageError(f"data: {', '.join(spec.paths)}: {error}.") from error
    if said is not None:
        return said
    if column not in row and not (spec.kind == "folder" and "text" in row):
        raise UsageError(f"data: rows have no field {column!r}; they have {', '.join(map(str, row))}.")
    text = row.get(column, row.get("text"))
    if text is not None and not isinstance(text, str):
        raise TypeError(f"the field {column!r} holds a {type(text).__name__}, not text")
    return text or ""


def _last_line(error: BaseException) -> str:
    """Where in a user's function an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" at {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def open_corpus(
    spec: SourceSpec, *, sleep: Callable[[float], None] = time.sleep, waits: Sequence[float] = _RETRY_SECONDS
) -> Corpus:
    """List a corpus's shards; reads no document. For `waits` see `hub_rows`.

    Raises:
        UsageError: if a path matches nothing or the kind is unknown.
        HubError: if a hub dataset cannot be reached.
    """
    if spec.kind not in KINDS:
        raise UsageError(f"data source kind {spec.kind!r}: choose one of {', '.join(KINDS)}.")
    if spec.kind == "hub":
        return _hub(spec, sleep, waits)
    if spec.kind == "python":
        shards: list[Shard] = [_function_shard(path) for path in spec.paths]
        return Corpus(spec=spec, shards=shards, identity=[list(spec.paths)], sleep=sleep)
    files = source_files(spec)
    shards = [_file_shard(kind, file, spec) for kind, file in files]
    identity = [[kind, file.name, file.stat().st_size, file.stat().st_mtime_ns] for kind, file in files]
    return Corpus(spec=spec, shards=shards, identity=identity, files=files, sleep=sleep)


def kind_of(file: Path) -> str | None:
    """The kind of source that a file's suffix stands for, whether compressed or not; None if it is not known."""
    return _KINDS_BY_SUFFIX.get(Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix)


def source_files(spec: SourceSpec) -> list[tuple[str, Path]]:
    """The files of a local source, each with its kind.

    Raises:
        UsageError: if a path matches nothing.
    """
    files: list[tuple[str, Path]] = []
    for path in spec.paths:
        if spec.kind == "folder":
            root = Path(path)
            matched = [file for file in sorted(root.glob(spec.pattern)) if file.is_file() and _shown(file, root)]
            if spec.pattern == _EVERY_FILE:
                matched = [file for file in matched if kind_of(file)]
            files += [(kind_of(file) or "text", file) for file in matched]
        else:
            matched = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]
            files += [(spec.kind, file) for file in matched]
        if not matched:
            raise UsageError(f"data: {path!r} matches no file (looked for kind {spec.kind} from {Path.cwd()}).")
    return files


def _shown(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _file_shard(kind: str, file: Path, spec: SourceSpec) -> Shard:
    def open_shard() -> Any:
        if kind == "jsonl":
            return JsonRows(file, spec.text_field)
        from datasets import load_dataset

        with _QuietDatasets():
            if kind == "parquet":
                return load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            whole = WHOLE.get(spec.documents)
            extra = {"sample_by": whole} if whole else {"sample_by": "line", "keep_linebreaks": True}
            return load_dataset("text", data_files=str(file), split="train", streaming=True, **extra)

    return open_shard


class _FunctionShard:
    """What a function yields, with the state of a `datasets` stream: how many documents were taken."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._taken = make, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, text in enumerate(self._make()):
            if number < self._taken:
                continue
            self._taken = number + 1
            if isinstance(text, list):
                yield {"text": conversation({"messages": text}, "messages")}
                continue
            if not isinstance(text, str):
                raise TypeError(f"document {number} is a {type(text).__name__}, not text")
            # Half a surrogate pair is no character, and no tokenizer takes it.
            yield {"text": text.encode("utf-8", "replace").decode("utf-8")}

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = int(state["taken"])


def _function_shard(path: str) -> Shard:
    module, _, name = path.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"data: {path!r} names no function ({error}). Write package.module:function.") from error
    return lambda: _FunctionShard(make)


def hub_rows(
    spec: SourceSpec,
    name: str | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    waits: Sequence[float] = _RETRY_SECONDS,
) -> Any:
    """Open a hub dataset as a stream of rows; while the hub is away, try again after each of `waits` seconds.

    Args:
        spec: configuration, split and revision.
        name: its id; by default the first of the spec.
        sleep: waits.
        waits: seconds before each further try.

    Raises:
        HubError: if it cannot be reached.
    """
    from datasets import load_dataset

    name = spec.paths[0] if name is None else name
    options = {"revision": spec.revision} if spec.revision else {}
    for wait in (*waits, None):
        try:
            with _QuietDatasets():
                return load_dataset(name, spec.config_name, split=spec.split, streaming=True, **options)
        except Exception as error:
            if wait is None or not _is_outage(error):
                raise HubError(
                    f"{name}: the dataset cannot be read ({type(error).__name__}: {str(error)[:200]}). Check the id, "
                    "configuration, split and connection, or download it and read the files."
                ) from error
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def _hub(spec: SourceSpec, sleep: Callable[[float], None], waits: Sequence[float]) -> Corpus:
    shards: list[Shard] = []
    counts: list[int] = []
    for name in spec.paths:
        data = hub_rows(spec, name, sleep=sleep, waits=waits)
        counts.append(data.num_shards)
        shards += [partial(data.shard, num_shards=counts[-1], index=index) for index in range(counts[-1])]
    identity = [*spec.paths, spec.config_name, spec.split, spec.revision, *counts]
    return Corpus(spec=spec, shards=shards, identity=identity, remote=True, sleep=sleep)


def _is_outage(error: Exception) -> bool:
    """Whether waiting may help: a connection, a time-out or a server's fault; not a missing dataset."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    name = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status >= 500 or status == 429)
    return isinstance(error, (ConnectionError, TimeoutError, OSError)) or any(
        word in name for word in ("Connect", "Timeout", "ReadError", "RemoteProtocol", "NetworkError")
    )


class _QuietDatasets:
    """Keep `datasets` from drawing progress bars over ours."""

    def __enter__(self) -> None:
        from datasets.utils import logging

        self._shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from datasets.utils import logging

        if self._shown:
            logging.enable_progress_bar()
