"""Reads the documents of a named source: a file, a folder, a hub dataset, or the text that comes with the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gqa_convert.data.conversations import conversation
from gqa_convert.data.documents import COMPRESSED, kind_of, open_corpus
from gqa_convert.data.named import FORMS, reading, source_named
from gqa_convert.errors import UsageError

DEMO = "demo"
"""The data that comes with the package: the held-out modules of this Python's standard library."""


_LINES = (".jsonl", ".ndjson")


_HUB_SPLIT = "test"


_HUB_CHARACTERS = 1 << 24


def read_records(data: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file.

    Raises:
        UsageError: naming the file and line of what is not a JSON object.
    """
    for number, line in enumerate(_read(data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--data {data}, line {number}: not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise UsageError(f"--data {data}, line {number}: a {type(record).__name__}, not a JSON object.")
        yield record


def read_documents(data: str, *, field: str = "text", separator: str = "") -> list[str]:
    """Read the documents to measure on.

    Args:
        data: a .jsonl file (one document a line), any other text file, a .parquet file, a folder of those, a hub
            dataset `id[:configuration[:split]]` (split `test` unless it says another; the first 16M characters), or
            `demo` for the package's own held-out text.
        field: the key or column that holds the text, or a conversation's messages.
        separator: what stands between the documents of a plain text file; without it the file is one document.

    Raises:
        UsageError: if there is no such file, or no text in it.
        HubError: if a hub dataset cannot be read.
    """
    path = Path(data).expanduser()
    if data == DEMO and not path.exists():
        from gqa_convert.data import stdlib

        _, held_out = stdlib.split(stdlib.collect())
        return [module.text() for module in held_out]
    if path.suffix in _LINES:
        documents = [_field(record, field, data) for record in read_records(data)]
    elif path.is_file() and kind_of(path) in (None, "text") and path.suffix not in COMPRESSED:
        whole = _read(data)
        documents = [part.strip("\n") for part in whole.split(separator)] if separator else [whole]
    else:
        documents = _corpus(data, field, separator)
    documents = [document for document in documents if document]
    if not documents:
        raise UsageError(f"--data {data}: holds no text.")
    return documents


def _corpus(data: str, field: str, separator: str) -> list[str]:
    """Read what training reads too."""
    try:
        spec = source_named(data, split=_HUB_SPLIT, text_field=field, documents=separator or "file")
        left = _HUB_CHARACTERS if spec.kind == "hub" else sys.maxsize
        texts = []
        with reading(data):
            corpus = open_corpus(spec, waits=())
        for document in corpus.all_documents():
            texts.append(document)
            left -= len(document)
            if left <= 0:
                break
    except UsageError as error:
        raise UsageError(f"--data {error}") from error
    return texts


def _read(data: str) -> str:
    try:
        return Path(data).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"--data {data}: does not exist. Give {FORMS}, or `{DEMO}` for the package's own.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {data}: cannot be read as UTF-8 text ({error}).") from error


def _field(record: dict[str, Any], field: str, data: str) -> str:
    try:
        said = conversation(record, field)
    except ValueError as error:
        raise UsageError(f"--data {data}: {error}.") from error
    if said is not None:
        return said
    value = record.get(field)
    if not isinstance(value, str):
        raise UsageError(f"--data {data}: a line has no text under {field!r} (only {', '.join(record)}).")
    return value
