"""Text named by one word, alike for calibration, evaluation and training: a file, a folder of files, a hub dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gqa_convert.data.documents import KNOWN_SUFFIXES, SourceSpec, kind_of
from gqa_convert.errors import HubError, UsageError

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
    path = Path(data).expanduser()
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
