import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gqa_convert.data.batches import (
    IGNORE,
    StepBatches,
    accumulation_steps,
    collate_causal,
    evaluation_batches,
    restarting_positions,
)
from gqa_convert.data.blocks import StoredBlocks, held_out_blocks, shuffled_index
from gqa_convert.data.documents import Corpus, SourceSpec, open_corpus
from gqa_convert.data.encoding import Ids
from gqa_convert.data.store import StoreWriter, TokenStore
from gqa_convert.data.stream import StreamedBlocks
from gqa_convert.errors import UsageError


def documents(count: int = 40, seed: int = 0) -> list[Ids]:
    rng = np.random.default_rng(seed)
    return [np.arange(n) + 1000 * i for i, n in enumerate(rng.integers(1, 30, count))]


@pytest.fixture
def store() -> TokenStore:
    return TokenStore.of(documents())


def test_blocks_without_shuffling_are_the_text_cut_up(store: TokenStore) -> None:
    blocks = StoredBlocks(store, 16, seed=None)
    joined = np.concatenate([blocks.get(i).ids[:-1] for i in range(store.total // 16)])
    assert (joined == store.tokens[: len(joined)]).all()
    assert all(blocks.get(i).ids[-1] == blocks.get(i + 1).ids[0] for i in range(20))


def test_an_epoch_holds_every_token_once_whatever_the_order(store: TokenStore) -> None:
    length = 7
    blocks = StoredBlocks(store, length, seed=3, window=1)
    count = -(-store.total // length)
    tokens = np.concatenate([blocks.get(i).ids[:-1] for i in range(count)])[: store.total]
    assert sorted(tokens) == sorted(store.tokens)
    assert (tokens != store.tokens).any()


def test_epochs_differ_and_join_without_a_seam(store: TokenStore) -> None:
    blocks = StoredBlocks(store, 1, seed=3, window=1)
    two = np.array([blocks.get(i).ids[0] for i in range(2 * store.total)])
    assert sorted(two[: store.total]) == sorted(two[store.total :])
    assert (two[: store.total] != two[store.total :]).any()


def test_windows_are_permutations() -> None:
    seen = [shuffled_index(i, seed=1, window=10) for i in range(30)]
    assert [sorted(seen[i : i + 10]) for i in (0, 10, 20)] == [list(range(i, i + 10)) for i in (0, 10, 20)]
    assert seen != sorted(seen)


def test_document_numbers_change_where_documents_do(store: TokenStore) -> None:
    blocks = StoredBlocks(store, 32, seed=5)
    for i in range(10):
        block = blocks.get(i)
        for a, b, same in zip(block.ids, block.ids[1:], np.diff(block.documents) == 0, strict=False):
            assert same == (b == a + 1)


def test_positions_restart_at_each_document_and_each_row() -> None:
    positions = restarting_positions(np.array([[4, 4, 4, 7, 7], [1, 2, 2, 2, 2]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]


def test_no_document_predicts_the_next(store: TokenStore) -> None:
    block = StoredBlocks(store, 32, seed=5).get(0)
    batch = collate_causal(True)([(0, block, 99)])
    ends = np.diff(block.documents) != 0
    assert (batch.labels[0].numpy()[ends] == IGNORE).all()
    assert (batch.labels[0].numpy()[~ends] == block.ids[1:][~ends]).all()
    assert batch.valid == int((~ends).sum())
    plain = collate_causal(False)([(0, block, 99)])
    assert plain.valid == 32
    assert "position_ids" not in plain.inputs


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_has_the_same_blocks_whatever_the_processes(store: TokenStore, processes: int, micro: int) -> None:
    def rows(step: int) -> list[tuple[int, ...]]:
        seen = []
        for rank in range(processes):
            batches = StepBatches(
                StoredBlocks(store, 8, seed=1), collate_causal(False),
                sequences=8, micro=micro, processes=processes, rank=rank,
            )  # fmt: skip
            seen += [tuple(row.tolist()) for part in batches.step(step) for row in part.inputs["input_ids"]]
            batches.close()
        return sorted(seen)

    reference = StoredBlocks(store, 8, seed=1)
    for step in (0, 3):
        assert rows(step) == sorted(tuple(reference.get(i).ids[:-1].tolist()) for i in range(8 * step, 8 * step + 8))


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does() -> None:
    assert accumulation_steps(12, micro=2, processes=3) == 2
    with pytest.raises(UsageError, match="Use 9"):
        accumulation_steps(10, micro=3, processes=1)


def test_held_out_blocks_cover_everything_once_and_pad_only_the_end(store: TokenStore) -> None:
    blocks = held_out_blocks(store, 16, None)
    batches = list(evaluation_batches(blocks, collate_causal(False), micro=3, processes=1, rank=0))
    assert sum(batch.valid for batch in batches) == store.total - 1
    split = [list(evaluation_batches(blocks, collate_causal(False), micro=3, processes=2, rank=r)) for r in (0, 1)]
    assert len(split[0]) == len(split[1])
    assert sum(batch.valid for half in split for batch in half) == store.total - 1
    assert sum(b.valid for b in evaluation_batches(
        held_out_blocks(store, 16, 32), collate_causal(False), micro=1, processes=1, rank=0)) == 32  # fmt: skip


def test_a_store_on_disk_is_whole_or_absent(tmp_path: Path, store: TokenStore) -> None:
    folder = tmp_path / "tokens"
    assert TokenStore.open(folder) is None
    writer = StoreWriter(folder, vocabulary=50_000)
    for row in documents():
        writer.add(row)
    assert TokenStore.open(folder) is None
    written = writer.commit({"key": "k"})
    assert written.tokens.dtype == np.uint16
    assert (np.asarray(written.tokens) == store.tokens).all()
    assert written.documents == 40
    again = StoreWriter(folder, vocabulary=50_000)
    again.add(np.arange(3))
    assert again.commit({}).total == store.total  # the first one wins
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]
    (folder / "store.json").unlink()
    assert TokenStore.open(folder) is None


class Numbers:
    """An encoder of texts that are numbers: `"5"` is five tokens of it."""

    def encode(self, texts: list[str]) -> list[Ids]:
        return [np.full(int(t) % 9 + 1, int(t)) for t in texts]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    for shard in range(3):
        lines = [json.dumps({"text": str(100 * shard + i)}) for i in range(70)]
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(lines))
    return open_corpus(SourceSpec(kind="jsonl", paths=(str(tmp_path / "*.jsonl"),)))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("stop", [0, 3, 8, 21, 100])
def test_a_stream_resumes_exactly_anywhere(corpus: Corpus, seed: int | None, stop: int) -> None:
    def make(state: dict[str, Any] | None = None) -> StreamedBlocks:
        return StreamedBlocks(corpus, cast(Any, Numbers()), 6, seed=seed, window=8, held_out=0.1, state=state)

    straight = make()
    expected = [straight.get(i).ids.tolist() for i in range(stop + 40)]
    first = make()
    for i in range(stop):
        first.get(i)
    second = make(json.loads(json.dumps(first.state(stop))))
    assert [second.get(i).ids.tolist() for i in range(stop, stop + 40)] == expected[stop:]


def test_a_stream_gives_every_token_of_an_epoch_once(corpus: Corpus) -> None:
    blocks = StreamedBlocks(corpus, cast(Any, Numbers()), 6, seed=7, window=8)
    total = sum(int(t) % 9 + 1 for t in corpus.all_documents())
    plain = np.sort(np.concatenate([np.full(int(t) % 9 + 1, int(t)) for t in corpus.all_documents()]))
    rows: list[Any] = [None] * (total // 6 // 8 * 8)
    for i in range(len(rows)):
        rows[shuffled_index(i, seed=7, window=8)] = blocks.get(i).ids[:-1]
    seen = np.concatenate(rows)
    missing = len(plain) - len(seen)
    counts = np.bincount(plain, minlength=400) - np.bincount(seen, minlength=400)
    assert counts.min() >= 0
    assert counts.sum() == missing


def test_a_stream_of_nothing_says_so(corpus: Corpus) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        StreamedBlocks(corpus, cast(Any, Numbers()), 6, seed=None, held_out=1.0).get(0)
