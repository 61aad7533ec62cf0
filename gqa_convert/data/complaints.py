"""What to say of a text or parquet file that cannot be read: the file, the line, and what is wrong there.

`datasets` reads files in blocks of megabytes and complains in the words of the library beneath it. A text file is
looked at again here, line by line, once something is known to be wrong with it.
"""

from __future__ import annotations

from pathlib import Path

from gqa_convert.data.json_lines import opened
from gqa_convert.errors import UsageError

_SHOWN = 160


def complaint(file: Path, kind: str, error: BaseException) -> UsageError:
    """The error to raise for a file that could not be read.

    Args:
        file: the data file.
        kind: `text`, `jsonl` or `parquet`.
        error: what was raised while reading it.
    """
    where = None
    if kind == "text":
        try:
            where = _not_text(file)
        except Exception as second:  # the fault lies below lines: compression, permission, a disk that fails
            error = second
    if where is not None:
        return UsageError(f"data: {file}, {where}.")
    return UsageError(f"data: {file}: cannot be read as {kind} ({_words(_cause(error))}).")


def _not_text(file: Path) -> str | None:
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}: not UTF-8 text (byte {line[error.start]:#04x} at column {error.start + 1})"
    return None


def _cause(error: BaseException) -> BaseException:
    """The innermost reason: what is wrapped around it says only that a dataset could not be made."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > _SHOWN:
        text = text[:_SHOWN].rstrip() + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
