"""The text of the embedded default as data sources: the standard library's modules, held out by name as ever."""

from __future__ import annotations

from collections.abc import Iterator


def training_texts() -> Iterator[str]:
    """Source files of the modules that the embedded model was trained on."""
    yield from _texts(0)


def held_out_texts() -> Iterator[str]:
    """Source files of the modules that it has never seen."""
    yield from _texts(1)


def _texts(side: int) -> Iterator[str]:
    from gqa_convert.demo import text

    for module in text.split(text.collect())[side]:
        yield module.text()
