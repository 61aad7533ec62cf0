"""Text named by one word, alike for calibration, evaluation and training: a file, a folder of files, a hub dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gqa_convert.data.documents import KNOWN_SUFFIXES, SourceSpec, kind_of
from gqa_convert.errors import HubError, UsageError

_LONGEST_PATH, _LONGEST_NAME = 4095, 255
_SUFFIXES = ", ".join(KNOWN_SUFFIXES)
FORMS = f"a {_SUFFIXES} file (compressed too), a folder of those, or a hub dataset `id[:configuration[:split]]`"
"""For messages and help."""


def source_named(data: str, *, split: str = "train", text_field: str = "text", documents: str = "file") -> SourceSpec:
    """Say where the documents of `data` come from.

    Args:
        data: a file, its kind told by its suffix; a folder, of which every file with a known suffix is read; or
            `id[:configuration[:split]]` of a hub dataset.
        split: of a hub dataset whose name says none.
        text_field: the column that holds the text.
        documents: how text files are cut; see `SourceSpec`.

    Raises:
        UsageError: if there is no such file, or none of a known kind.
    """
    problem = unfit_name(data)
    if problem:
        raise UsageError(f"{data[:80]!r}: cannot be a path ({problem}). Give {FORMS}.")
    try:
        path = Path(data).expanduser()
    except RuntimeError as error:  # the home of a user that is not there
        raise UsageError(f"{data[:80]!r}: cannot be a path ({error}). Give {FORMS}.") from error
    if path.is_dir():
        spec = SourceSpec(kind="folder", paths=(str(path),), text_field=text_field, documents=documents)
        if not any(kind_of(file) for file in path.rglob("*") if file.is_file()):
            raise UsageError(f"{path}: holds no {_SUFFIXES} file.")
        return spec
    kind = kind_of(path)
    if path.is_file():
        if kind is None:
            raise UsageError(f"{path}: cannot be read as text. Give {FORMS}.")
        return SourceSpec(kind=kind, paths=(str(path),), text_field=text_field, documents=documents)
    if kind is not None or data.startswith(("/", ".", "~")) or data.count("/") > 1:
        raise UsageError(f"{data}: no such file or folder. Give {FORMS}.")
    name, _, rest = data.partition(":")
    configuration, _, own_split = rest.partition(":")
    return SourceSpec(
        kind="hub", paths=(name,), text_field=text_field, config_name=configuration or None, split=own_split or split
    )


def unfit_name(text: str) -> str | None:
    """Say why no file system takes `text` for a path; None if one might."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        return "it holds half a surrogate pair"
    if not text.strip():
        return "it is empty"
    if b"\0" in data:
        return "it holds a null character"
    if len(data) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in data.split(b"/")):
        return "it is too long"
    return None


@contextmanager
def reading(data: str) -> Iterator[None]:
    """Say of a hub dataset that cannot be read that its name is no file's either.

    Raises:
        HubError: in the place of another one.
    """
    try:
        yield
    except HubError as error:
        raise HubError(f"{data}: no such file here, and as a hub dataset: {error}") from error
