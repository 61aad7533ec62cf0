"""Rows of a JSON file: one object per line, or one array of objects. Resumable at any row; errors name file and line.

Of our own, since `datasets` guesses a type for each column: texts that look like dates came back with a time of day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gqa_convert.data.conversations import conversation
from gqa_convert.errors import UsageError

_PEEKED = 1 << 12
_UTF8_MARK = b"\xef\xbb\xbf"


class JsonRows:
    """The objects of a file as a stream with a state, as `datasets` has them.

    Args:
        file: may be compressed.
        column: the field that holds the text, or messages (see `gqa_convert.data.conversations`).

    Raises:
        UsageError: naming the file and the line of what cannot be read.
    """

    def __init__(self, file: Path, column: str) -> None:
        self._file, self._column = file, column
        self._row, self._offset = 0, 0
        self._column_seen = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with opened(self._file) as stream:
            start = stream.read(_PEEKED).removeprefix(_UTF8_MARK).lstrip()
            stream.seek(0)
            yield from self._entries(stream.read()) if start.startswith(b"[") else self._lines(stream)

    def _lines(self, stream: BinaryIO) -> Iterator[dict[str, Any]]:
        if self._offset:
            stream.seek(self._offset)  # of a compressed file, reads it up to there
        number = self._row
        while line := stream.readline():
            number += 1
            self._offset += len(line)
            self._row = number
            if number == 1:
                line = line.removeprefix(_UTF8_MARK)
            if line.strip():
                yield self._checked(_parse(line, f"{self._file}, line {number}"), f"line {number}")

    def _entries(self, data: bytes) -> Iterator[dict[str, Any]]:
        rows = _parse(data.removeprefix(_UTF8_MARK), str(self._file))
        while self._row < len(rows):
            self._row += 1
            yield self._checked(rows[self._row - 1], f"entry {self._row}")

    def _checked(self, row: Any, where: str) -> dict[str, Any]:
        try:
            said = conversation(row, self._column) if isinstance(row, dict) else None
        except ValueError as error:
            raise UsageError(f"data: {self._file}, {where}: {error}.") from error
        if said is not None:
            self._column_seen = True
            return {self._column: said}
        problem = _problem(row, self._column)
        if problem:
            raise UsageError(f"data: {self._file}, {where}: {problem}.")
        if self._column in row or "text" in row:
            self._column_seen = True
        elif not self._column_seen:
            present = ", ".join(map(str, row)) or "none"
            raise UsageError(f"data: {self._file}, {where}: has no field {self._column!r}; it has {present}.")
        return {self._column: None, **row} if "text" not in row else dict(row)

    def state_dict(self) -> dict[str, Any]:
        """Where the next row begins."""
        return {"row": self._row, "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._row, self._offset = int(state["row"]), int(state["offset"])
        self._column_seen = self._row > 0


def opened(file: Path) -> BinaryIO:
    """Open a file for reading, compressed or not (told by its suffix)."""
    import fsspec

    stream: BinaryIO = fsspec.open(str(file), "rb", compression="infer").open()
    return stream


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"data: {where}: not UTF-8 text (byte {text[error.start]:#04x}).") from error
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UsageError(f"data: {where}{line}: not JSON ({error.msg} at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"data: {where}: not JSON that can be read ({' '.join(str(error).split())[:120]}).") from error


def _problem(row: Any, column: str) -> str | None:
    if not isinstance(row, dict):
        return f"holds a {type(row).__name__}, not an object with a field {column!r}"
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        return f"its field {column!r} holds a {type(text).__name__}, not text"
    if text is not None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"its field {column!r} holds half a surrogate pair ({text[error.start]!a}), which is no character"
    return None
