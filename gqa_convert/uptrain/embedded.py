"""The text of the embedded default as data sources: the standard library's modules, held out by name as ever."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice


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


def some_training_texts() -> Iterator[str]:
    """A sample of the modules that the embedded model was trained on: enough for a demonstration, quick to tokenise."""
    yield from _sample(_texts(0), every=6)


def some_held_out_texts() -> Iterator[str]:
    """A sample of the modules that it has never seen."""
    yield from _sample(_texts(1), every=6)


def _sample(texts: Iterator[str], every: int) -> Iterator[str]:
    return islice(texts, 0, None, every)
