from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gqa_convert.data.batches import collate_spans
from gqa_convert.data.blocks import Block
from gqa_convert.data.spans import SpanCorruption, noise_mask, sentinel_ids
from gqa_convert.errors import UsageError

SENTINELS = tuple(range(32099, 31999, -1))


def t5(inputs: int = 512, **options: Any) -> SpanCorruption:
    return SpanCorruption.fitting(inputs, sentinels=SENTINELS, eos=1, **options)


def test_lengths_are_those_of_the_paper() -> None:
    corruption = t5()
    assert (corruption.raw_length, corruption.inputs_length, corruption.targets_length) == (568, 512, 114)


@settings(max_examples=60, deadline=None)
@example(inputs=8, density=0.59375, mean_span=1.25, seed=0)  # more spans asked for than tokens lie between them
@given(
    inputs=st.integers(8, 600),
    density=st.floats(0.05, 0.6),
    mean_span=st.floats(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_inputs_and_targets_reconstruct_the_text_and_fill_their_length(
    inputs: int, density: float, mean_span: float, seed: int
) -> None:
    try:
        corruption = t5(inputs, density=density, mean_span=mean_span)
    except UsageError:
        return
    rng = np.random.default_rng(seed)
    text = rng.integers(2, 31000, corruption.raw_length)
    source, target = corruption.corrupt(text, rng)
    assert len(source) == corruption.inputs_length <= inputs
    assert len(target) == corruption.targets_length
    assert (corruption.reconstruct(source, target) == text).all()
    assert source[-1] == target[-1] == 1


def test_sentinels_come_in_order_in_both() -> None:
    corruption = t5(64)
    source, target = corruption.corrupt(np.arange(2, 2 + corruption.raw_length), np.random.default_rng(0))
    for row in (source, target):
        used = [i for i in row.tolist() if i in SENTINELS]
        assert used == list(SENTINELS[: len(used)])


def test_density_and_span_length_are_as_asked() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([noise_mask(568, 0.15, 3.0, rng) for _ in range(2000)])
    assert masks.mean() == pytest.approx(0.15, abs=0.001)
    starts = (masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]).sum()
    assert masks.sum() / starts == pytest.approx(3.0, rel=0.02)
    assert not masks[:, 0].any()
    # Every place but the ends is noise about equally often: four standard errors of a share of 0.15.
    middle = masks[:, 20:-20].mean(0)
    assert abs(middle - middle.mean()).max() < 4.5 * np.sqrt(0.15 * 0.85 / 2000)


def test_the_batch_is_a_function_of_seed_and_block() -> None:
    corruption = t5(32)
    block = Block(np.arange(2, 2 + corruption.raw_length + 1), np.zeros(corruption.raw_length + 1, np.int64))
    collate = collate_spans(corruption, seed=4, decoder_start=0)
    one, same, other = collate([(5, block, 99)]), collate([(5, block, 99)]), collate([(6, block, 99)])
    assert (one.labels == same.labels).all()
    assert (one.labels != other.labels).any()
    assert one.inputs["decoder_input_ids"][0, 0] == 0
    assert (one.inputs["decoder_input_ids"][0, 1:] == one.labels[0, :-1]).all()
    assert one.valid == corruption.targets_length


@pytest.mark.parametrize(
    ("inputs", "options"), [(4000, {}), (512, {"density": 1.5}), (512, {"mean_span": 0.5}), (2, {})]
)
def test_impossible_corruption_is_refused(inputs: int, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        t5(inputs, **options)


class Tokenizer:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def test_sentinels_are_found_by_name() -> None:
    assert sentinel_ids(Tokenizer({"<extra_id_0>": 9, "<extra_id_1>": 8, "a": 0})) == (9, 8)
    with pytest.raises(UsageError, match="sentinel"):
        sentinel_ids(Tokenizer({"a": 0}))
