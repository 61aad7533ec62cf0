"""A stream dealt out as many streams, so that every process reads its own part of the corpus and no other.

Block i of the training order is block `i // S` of stream `i % S`; stream s reads every S-th shard from s on. With S a
divisor of a step's sequences, the rows that a process computes are always those of the same few streams, and the others
are never opened there. The order depends on S, and not on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gqa_convert.data.blocks import Block
from gqa_convert.data.documents import Corpus
from gqa_convert.data.stream import StreamedBlocks
from gqa_convert.errors import CheckpointError

Open = Callable[[Corpus, "dict[str, Any] | None"], StreamedBlocks]


def stream_count(shards: int, sequences: int) -> int:
    """How many streams a corpus is dealt out as: the largest divisor of a step's sequences that has shards enough."""
    return max(count for count in range(1, sequences + 1) if sequences % count == 0 and count <= max(1, shards))


def part_of(corpus: Corpus, number: int, streams: int) -> Corpus:
    """The shards of stream `number`."""
    return replace(corpus, shards=corpus.shards[number::streams], files=corpus.files[number::streams])


class StridedBlocks:
    """Blocks of a corpus dealt out as `streams` streams, each opened when it is first asked for.

    Args:
        corpus: the documents.
        streams: how many.
        open_stream: opens one, from its state if there is one.
        state: from `state` of every process, put together by `merged`.

    Raises:
        CheckpointError: if `state` is no such state.
    """

    def __init__(self, corpus: Corpus, streams: int, open_stream: Open, *, state: dict[str, Any] | None = None) -> None:
        self._corpus, self._streams, self._open_stream = corpus, streams, open_stream
        self._opened: dict[int, StreamedBlocks] = {}
        saved = {} if state is None else state.get("streams")
        if not isinstance(saved, dict):
            raise CheckpointError("data: the checkpoint does not say where its streams were. Resume from another one.")
        self._saved = saved

    def get(self, index: int) -> Block:
        """Return block `index` of the training order."""
        inside, number = divmod(index, self._streams)
        return self._stream(number).get(inside)

    def state(self, index: int) -> dict[str, Any]:
        """What to keep of the streams that were opened here, so that a later run can go on with block `index`."""
        streams = {
            str(number): stream.state(-(-(index - number) // self._streams)) for number, stream in self._opened.items()
        }
        return {"count": self._streams, "streams": streams}

    def _stream(self, number: int) -> StreamedBlocks:
        if number not in self._opened:
            part = part_of(self._corpus, number, self._streams)
            self._opened[number] = self._open_stream(part, self._saved.get(str(number)))
        return self._opened[number]


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of all processes as one: of what each of them knows a part, everything."""
    whole: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = merged([whole[key], value]) if both else whole.get(key, value)
    return whole
