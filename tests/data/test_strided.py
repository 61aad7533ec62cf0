"""A stream dealt out: every document once, each process its own shards, gone on with exactly."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gqa_convert.data.documents import Corpus, SourceSpec, open_corpus
from gqa_convert.data.encoding import Ids
from gqa_convert.data.stream import StreamedBlocks
from gqa_convert.data.strided import StridedBlocks, merged, part_of, stream_count


class Numbers:
    """Each text is numbers; they are its tokens."""

    def encode(self, texts: list[str]) -> list[Ids]:
        return [np.array([int(word) for word in text.split()], np.int64) for text in texts]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rng = np.random.default_rng(0)
    number = 0
    for shard in range(12):
        rows = []
        for _ in range(30):
            count = int(rng.integers(2, 20))
            rows.append(json.dumps({"text": " ".join(map(str, range(number, number + count)))}))
            number += count
        (tmp_path / f"{shard:02d}.jsonl").write_text("\n".join(rows) + "\n")
    return open_corpus(SourceSpec(kind="jsonl", paths=(str(tmp_path / "*.jsonl"),)))


def strided(
    corpus: Corpus, streams: int, opened: list[list[str]] | None = None, state: dict[str, Any] | None = None
) -> StridedBlocks:
    def open_stream(part: Corpus, at: dict[str, Any] | None) -> StreamedBlocks:
        if opened is not None:
            opened.append([file.name for _, file in part.files])
        return StreamedBlocks(part, cast(Any, Numbers()), 8, seed=3, window=4, state=at)

    return StridedBlocks(corpus, streams, open_stream, state=state)


def test_the_number_of_streams_divides_a_step_and_has_shards() -> None:
    assert [stream_count(shards, 512) for shards in (1, 3, 100, 512, 9000)] == [1, 2, 64, 512, 512]
    assert stream_count(100, 7) == 7
    assert stream_count(0, 4) == 1


def test_streams_share_the_shards_out(corpus: Corpus) -> None:
    names = [file.name for number in range(5) for _, file in part_of(corpus, number, 5).files]
    assert sorted(names) == [file.name for _, file in corpus.files]


def test_a_process_opens_its_own_streams_alone_and_reads_what_one_would(corpus: Corpus) -> None:
    """Steps of 6 sequences in 6 streams, one row a forward pass, over 3 processes."""
    alone = strided(corpus, 6)
    everything = [alone.get(i).ids.tolist() for i in range(60)]
    for rank in range(3):
        opened: list[list[str]] = []
        mine = strided(corpus, 6, opened)
        rows = [i for i in range(60) if i % 6 % 3 == rank]
        assert [mine.get(i).ids.tolist() for i in rows] == [everything[i] for i in rows]
        assert len(opened) == 2
        assert sum(map(len, opened)) == 4


def test_it_goes_on_with_any_number_of_processes(corpus: Corpus) -> None:
    alone = strided(corpus, 6)
    everything = [alone.get(i).ids.tolist() for i in range(90)]
    parts = []
    for rank in range(3):
        mine = strided(corpus, 6)
        for i in range(48):  # a step ahead of where it is saved
            if i % 6 % 3 == rank:
                mine.get(i)
        parts.append(json.loads(json.dumps(mine.state(42))))
    state = merged(parts)
    assert sorted(state["streams"]) == [str(i) for i in range(6)]
    resumed = strided(corpus, 6, state=state)
    assert [resumed.get(i).ids.tolist() for i in range(42, 90)] == everything[42:]


def test_states_are_put_together_at_any_depth() -> None:
    one = {"sources": {"a": {"count": 2, "streams": {"0": {"x": 1}}}, "b": {"digest": "d"}}}
    two = {"sources": {"a": {"count": 2, "streams": {"1": {"x": 2}}}, "b": {"digest": "d"}}}
    assert merged([one, two]) == {
        "sources": {"a": {"count": 2, "streams": {"0": {"x": 1}, "1": {"x": 2}}}, "b": {"digest": "d"}}
    }
    assert merged([{"train_tokens": 5}] * 3) == {"train_tokens": 5}
