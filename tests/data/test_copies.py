"""Documents to learn copying from: what is said comes back, and nothing is said by chance."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_convert.data.copies import copies

WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
PROSE = " ".join(WORDS)


def border(document: str) -> int:
    """The longest beginning of a document, short of half of it, that is its end too."""
    return max(size for size in range(len(document) // 2 + 1) if document[:size] == document[len(document) - size :])


@given(length=st.integers(200, 2000), seed=st.integers(0, 5))
def test_passages_come_back_after_another_and_lines_in_another_order(length: int, seed: int) -> None:
    made = list(islice(copies([PROSE, PROSE[500:] + "x" * 3000], length=length, seed=seed), 9))
    assert made == list(islice(copies([PROSE, PROSE[500:] + "x" * 3000], length=length, seed=seed), 9))
    for number, document in enumerate(made):
        if number % 3 < 2:
            assert border(document) >= 0.03 * length
            assert len(document) <= length
            continue
        first, second = (part.split("\n") for part in document.split("\n\n"))
        assert sorted(first) == sorted(second)
        assert len(first) >= 3


def test_seeds_differ() -> None:
    one, other = (next(copies([PROSE], length=500, seed=seed)) for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("text", ["a", "日本語のテキスト" * 40, "12 34 " * 50])
def test_text_without_words_has_passages_alone(text: str) -> None:
    for document in islice(copies([text], length=300), 6):
        assert document == document.strip()
        assert border(document) >= 1
