"""Documents of a text source in an order drawn from the whole of it, without reading the whole of it into memory."""

from __future__ import annotations

import json
import mmap
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gqa_convert.data.conversations import COLUMNS, conversation
from gqa_convert.data.documents import SourceSpec, hub_rows, open_corpus, source_files
from gqa_convert.data.named import reading, source_named
from gqa_convert.data.reading import DEMO
from gqa_convert.data.stdlib import training_texts
from gqa_convert.errors import HubError, UsageError

SEPARATOR = "<|endoftext|>"
"""What divides a .txt file into documents, if it is there at all."""

_PIECE_BYTES = 1 << 15  # a .txt file without separators is cut at the line ends after so much
_CUT = (".txt", ".jsonl", ".ndjson")  # files that can be read from any line on; of other kinds whole
_SHUFFLE_ROWS = 2000  # rows that a streamed hub dataset is shuffled over


def documents(data: str, *, seed: int = 0) -> Iterator[str]:
    """Yield the documents of `data` in an order drawn from `seed`, each once; rows of messages as conversations.

    Args:
        data: a file, a folder or a hub dataset (read as a stream), as `gqa_convert.data.named.source_named` takes them,
            the text in the field `text`; or `demo`: what the embedded model was trained on, the standard library's
            modules but for those that `gqa eval --data demo` measures on.
        seed: for the order.

    Raises:
        UsageError: if there is nothing to read, or a row has no text.
        HubError: if a hub dataset cannot be read.
    """
    if data == DEMO and not Path(data).exists():
        texts = list(training_texts())
        random.Random(seed).shuffle(texts)
        return iter(texts)
    spec = source_named(data)
    if spec.kind == "hub":
        return _hub(data, spec, seed)
    return _local([file for _, file in source_files(spec)], random.Random(seed))


def _local(files: list[Path], draw: random.Random) -> Iterator[str]:
    """Yield documents of all files, in spans drawn from all of them at random."""
    spans = [(file, span) for file in files for span in _spans(file)]
    draw.shuffle(spans)
    for file, span in spans:
        texts = list(_read(file, span))
        draw.shuffle(texts)
        yield from texts


def _spans(file: Path) -> list[tuple[int, int]]:
    """Where the documents of a file lie: byte ranges, or (row group, rows) of a parquet file."""
    if file.suffix == ".parquet":
        table = _parquet(file)
        return [(group, table.metadata.row_group(group).num_rows) for group in range(table.num_row_groups)]
    if file.suffix not in _CUT or file.stat().st_size == 0:
        return [(0, 0)]
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if file.suffix == ".txt" and view.find(SEPARATOR.encode()) >= 0:
            return _cut(view, SEPARATOR.encode(), 0)
        return _cut(view, b"\n", _PIECE_BYTES if file.suffix == ".txt" else 0)


def _cut(view: mmap.mmap, mark: bytes, least: int) -> list[tuple[int, int]]:
    spans, start = [], 0
    while start < len(view):
        end = view.find(mark, start + least)
        end = len(view) if end < 0 else end + (len(mark) if mark == b"\n" else 0)
        spans.append((start, end))
        start = end + (0 if mark == b"\n" else len(mark))
    return spans


def _read(file: Path, span: tuple[int, int]) -> Iterator[str]:
    if file.suffix == ".parquet":
        table = _parquet(file)
        present = table.schema_arrow.names
        wanted = [name for name in ("text", *COLUMNS) if name in present][:1]
        if not wanted:
            raise UsageError(f"{file}: has no column `text` or `messages` (it has {', '.join(present)}).")
        if wanted != ["text"] and "tools" in present:
            wanted.append("tools")
        rows = table.read_row_group(span[0], columns=wanted).to_pylist()
        yield from (document for row in rows if (document := _document(row, str(file))))
        return
    if file.suffix not in _CUT:
        yield from open_corpus(source_named(str(file))).all_documents()
        return
    with open(file, "rb") as stream:
        stream.seek(span[0])
        text = stream.read(span[1] - span[0]).decode("utf-8", errors="replace")
    if file.suffix != ".txt":
        text = _row(file, span[0], text) if text.strip() else ""
    if text.strip():
        yield text


def _document(row: dict[str, Any], where: str) -> str | None:
    """What a row of a table or dataset says; None for nothing."""
    try:
        said = conversation(row, "text")
    except ValueError as error:
        raise UsageError(f"{where}: {error}.") from error
    return said if said is not None else row.get("text")


def _row(file: Path, offset: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{file}: the line at byte {offset} is not JSON ({error}).") from error
    try:
        said = conversation(row, "text") if isinstance(row, dict) else None
    except ValueError as error:
        raise UsageError(f"{file}: the line at byte {offset}: {error}.") from error
    if said is not None:
        return said
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        seen = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(f'{file}: the line at byte {offset} has no "text" (it has {seen}).')
    return str(row["text"])


def _parquet(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as parquet ({error}).") from error


def _hub(data: str, spec: SourceSpec, seed: int) -> Iterator[str]:
    try:
        with reading(data):
            rows = hub_rows(spec, waits=())
        for row in rows.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS):
            document = _document(row, data)
            if not isinstance(document, str):
                raise UsageError(f"{data}: its rows have no text column `text` (they have {', '.join(row)}).")
            if document.strip():
                yield document
    except (UsageError, HubError):
        raise
    except Exception as error:  # datasets lets errors of every library beneath it through
        text = " ".join(str(error).split())[:300]
        raise HubError(f"{data}: reading the hub dataset failed ({type(error).__name__}: {text}).") from error
