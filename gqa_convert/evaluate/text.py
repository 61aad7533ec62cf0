"""Text to measure on: read documents, turn them into one stream of tokens, and cut windows from it.

The stream keeps, for every token, how many UTF-8 bytes of text it stands for, so that a loss can be given per byte and
compared between tokenizers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.data.documents import COMPRESSED, kind_of, open_corpus
from gqa_convert.data.named import FORMS, reading, source_named
from gqa_convert.errors import UsageError

DEMO = "demo"
"""The data that comes with the package: the held-out modules of this Python's standard library."""

_LINES = (".jsonl", ".ndjson")
_HUB_SPLIT = "test"
_HUB_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class TokenStream:
    """Tokens of all documents, joined. `sizes[i]` is the number of UTF-8 bytes that `ids[i]` stands for."""

    ids: list[int]
    sizes: list[int]


@dataclass(frozen=True)
class Window:
    """A stretch of the stream: `length` tokens from `start`, of which those from `first` on are scored (first >= 1)."""

    start: int
    length: int
    first: int

    @property
    def scored(self) -> range:
        """Places in the stream whose tokens this window scores."""
        return range(self.start + self.first, self.start + self.length)


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
        field: the key or column that holds the text.
        separator: what stands between the documents of a plain text file; without it the file is one document.

    Raises:
        UsageError: if there is no such file, or no text in it.
        HubError: if a hub dataset cannot be read.
    """
    path = Path(data).expanduser()
    if data == DEMO and not path.exists():
        from gqa_convert.demo import text

        _, held_out = text.split(text.collect())
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
        found = []
        with reading(data):
            corpus = open_corpus(spec, waits=())
        for document in corpus.all_documents():
            found.append(document)
            left -= len(document)
            if left <= 0:
                break
    except UsageError as error:
        raise UsageError(f"--data {error}") from error
    return found


def _read(data: str) -> str:
    try:
        return Path(data).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"--data {data}: does not exist. Give {FORMS}, or `{DEMO}` for the package's own.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {data}: cannot be read as UTF-8 text ({error}).") from error


def _field(record: dict[str, Any], field: str, data: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise UsageError(f"--data {data}: a line has no text under {field!r} (only {', '.join(record)}).")
    return value


def encode(documents: Iterable[str], tokenizer: Any, *, special: bool = True, eos: bool = True) -> TokenStream:
    """Tokenise documents and join them.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer.
        special: let the tokenizer add the special tokens it adds by default (BOS, for most that have one).
        eos: end every document with EOS, where the tokenizer has one and did not put it there itself.
    """
    ids: list[int] = []
    sizes: list[int] = []
    fast = bool(getattr(tokenizer, "is_fast", False))
    for document in documents:
        coded = tokenizer(document, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
        own = list(coded["input_ids"])
        sizes += _sizes(document, coded["offset_mapping"]) if fast else _even(len(document.encode()), len(own))
        ids += own
        if eos and tokenizer.eos_token_id is not None and (not own or own[-1] != tokenizer.eos_token_id):
            ids.append(tokenizer.eos_token_id)
            sizes.append(0)
    return TokenStream(ids, sizes)


def _sizes(document: str, offsets: Iterable[tuple[int, int]]) -> list[int]:
    """Give each token the bytes from the end of the one before it to its own end, so that every byte counts once.

    Tokens of one character's bytes share an offset, and spaces that a tokenizer drops belong to none.
    """
    sizes, done = [], 0
    for _, end in offsets:
        sizes.append(len(document[done:end].encode("utf-8", "surrogatepass")) if end > done else 0)
        done = max(done, end)
    return sizes


def _even(total: int, count: int) -> list[int]:
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def windows(total: int, *, context: int, stride: int, limit: int | None = None) -> list[Window]:
    """Cut a stream of `total` tokens into windows of `context` tokens, one every `stride`.

    Each token is scored once, in the first window that holds it behind another token. With `stride == context` the
    windows lie side by side, each scores its own `context - 1` next tokens, and a tail that fills no window is left
    out; otherwise the last window is moved back so that it ends with the stream.

    Args:
        total: tokens in the stream.
        context: tokens a window.
        stride: tokens from one window to the next.
        limit: keep only this many windows, evenly spread.

    Raises:
        UsageError: if the numbers do not fit together, or the stream has fewer than two tokens.
    """
    if context < 2 or not 1 <= stride <= context:
        raise UsageError(f"--context {context} --stride {stride}: need 1 <= stride <= context and context >= 2.")
    if total < 2:
        raise UsageError(f"the text has {total} tokens; at least two are needed to predict one from another.")
    context = min(context, total)
    found = []
    done = 0
    start = 0
    while start + context <= total:
        found.append(Window(start, context, max(done - start, 1)))
        done = start + context
        start += stride
    if stride < context and done < total:
        found.append(Window(total - context, context, done - (total - context)))
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found
