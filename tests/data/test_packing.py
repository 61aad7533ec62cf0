"""Whole documents in blocks, and sources mixed by weight."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_convert.data.batches import IGNORE, collate_causal
from gqa_convert.data.conversations import UNSCORED
from gqa_convert.data.mixture import LONGEST, MixedBlocks, Mixture
from gqa_convert.data.packing import PackedBlocks, held_out_packed, pack
from gqa_convert.data.store import TokenStore


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 24))
def test_every_token_is_in_one_bin_and_only_what_is_too_long_is_cut(sizes: list[int], capacity: int) -> None:
    bins = pack(sizes, capacity)
    assert all(0 < sum(size for _, _, size in pieces) <= capacity for pieces in bins)
    seen = Counter((doc, start + i) for pieces in bins for doc, start, size in pieces for i in range(size))
    assert seen == Counter((doc, i) for doc, size in enumerate(sizes) for i in range(size))
    whole = {doc for doc, size in enumerate(sizes) if 0 < size <= capacity}
    assert whole <= {doc for pieces in bins for doc, start, size in pieces if start == 0 and size == sizes[doc]}


def test_few_blocks_are_padding_where_documents_are_short() -> None:
    rng = np.random.default_rng(0)
    store = TokenStore.of([np.arange(n) + 1000 * i for i, n in enumerate(rng.integers(5, 40, 2000))])
    assert PackedBlocks(store, 100, seed=1).padding < 0.02


def test_an_epoch_of_packed_blocks_has_every_document_whole_and_padding_is_never_learnt() -> None:
    rng = np.random.default_rng(0)
    store = TokenStore.of([np.arange(n) + 100 * (i + 1) for i, n in enumerate(rng.integers(2, 30, 90))])
    blocks = PackedBlocks(store, 63, seed=2)
    count = blocks.epoch_blocks()
    epochs = [[blocks.get(i) for i in range(count)], [blocks.get(i) for i in range(count, 2 * count)]]
    for epoch in epochs[:1]:
        documents = [
            tuple(block.ids[block.documents == number])
            for block in epoch
            for number in np.unique(block.documents)
            if not block.ids[block.documents == number][0] & UNSCORED
        ]
        assert sorted(documents) == sorted(tuple(store.tokens[a:b]) for a, b in zip(
            store.starts, store.starts[1:], strict=False))  # fmt: skip
    assert any((a.ids != b.ids).any() for a, b in zip(*epochs, strict=True))
    padded = next(block for block in epochs[0] if block.ids[-1] & UNSCORED)
    batch = collate_causal(True)([(0, padded, 1 << 62)])
    padding = (padded.ids & UNSCORED) > 0
    assert (batch.labels[0].numpy()[padding[1:]] == IGNORE).all()
    assert (batch.inputs["input_ids"][0].numpy()[padding[:-1]] == 0).all()
    again = PackedBlocks(store, 63, seed=2)
    assert (again.get(count + 1).ids == epochs[1][1].ids).all()


def test_held_out_documents_are_whole_and_come_once() -> None:
    store = TokenStore.of([np.arange(10) + 100 * i for i in range(1, 9)])
    held = held_out_packed(store, 20, None)
    seen = sorted(int(i) for block, _ in held for i in block.ids if not i & UNSCORED)
    assert seen == sorted(store.tokens)
    assert len(held_out_packed(store, 20, 20)) == 1


class Numbered:
    def __init__(self, source: str) -> None:
        self.source = source

    def get(self, index: int) -> Any:
        return (self.source, index)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.7, 1.0, 2.0, 3.5, 17.0]), min_size=2, max_size=5))
def test_proportions_hold_over_10_000_blocks_and_any_hundred_are_near_them(weights: list[float]) -> None:
    mixture = Mixture(weights)
    picked = [mixture.locate(i) for i in range(10_000)]
    shares = np.array(weights) / sum(weights)
    sources = np.array([source for source, _ in picked])
    counted = np.bincount(sources, minlength=len(weights)) / len(picked)
    assert np.abs(counted - shares).max() < 0.0005
    for first in range(0, 9_000, 333):
        part = np.bincount(sources[first : first + 100], minlength=len(weights))
        assert np.abs(part - 100 * shares).max() <= len(weights)
    for source in range(len(weights)):  # every source is read in order, nothing twice and nothing left out
        assert [inside for s, inside in picked if s == source] == list(range(int((sources == source).sum())))


def test_any_position_is_found_without_what_came_before() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    assert mixture.parts == (7, 2, 1)
    mixed = MixedBlocks(mixture, [Numbered(name) for name in "abc"])
    assert [mixed.get(i) for i in range(1000, 1100)] == [
        MixedBlocks(Mixture([7, 2, 1]), [Numbered(name) for name in "abc"]).get(i) for i in range(1000, 1100)
    ]
    assert mixture.passed(1003) == [sum(mixture.locate(i)[0] == k for i in range(1003)) for k in range(3)]


def test_weights_that_are_no_small_fractions_are_rounded() -> None:
    mixture = Mixture([0.123456789, 1.0, 0.00001])
    assert mixture.period == LONGEST
    assert min(mixture.parts) == 1
    assert mixture.parts[0] / LONGEST == pytest.approx(0.123456789 / 1.123466789, abs=2e-4)
