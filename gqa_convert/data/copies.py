"""Passages that come back: text that is predicted by looking back at where it was said before.

Natural text asks for that only now and then, so a little of it teaches a model little of it, and copying is what goes
first with a model's KV heads. Imports no torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"\b[^\W\d_]{3,12}\b")
_FEWEST_WORDS = 50
_LONGEST_PASSAGE, _LONGEST_BETWEEN, _SHORTEST = 0.36, 0.24, 0.08
"""Shares of a document's length."""
_LINE = 30
"""Characters of a line of a list, about."""


def copies(texts: Sequence[str], *, length: int, seed: int = 0) -> Iterator[str]:
    """Yield documents without end: two of three are a passage, another one, and the first again; one is a list twice.

    The list's lines are words of the texts and numbers, and they come back in another order.

    Args:
        texts: to take passages and words from.
        length: characters of the longest document, lists about.
        seed: of what is drawn.
    """
    draw = random.Random(f"{seed} copies")
    words = sorted({word for text in texts for word in _WORD.findall(text[: 20 * length])})
    weights = [len(text) for text in texts]
    kinds = ("passage", "passage", "list") if len(words) >= _FEWEST_WORDS else ("passage",)
    while True:
        for kind in kinds:
            if kind == "list":
                yield _list(words, length, draw)
                continue
            again, between = (
                _passage(
                    draw.choices(texts, weights)[0], draw.randint(int(_SHORTEST * length), int(most * length)), draw
                )
                for most in (_LONGEST_PASSAGE, _LONGEST_BETWEEN)
            )
            yield "\n\n".join((again, between, again))


def _passage(text: str, size: int, draw: random.Random) -> str:
    """Some characters from anywhere in a text, from the beginning of a word on where there is one."""
    start = draw.randrange(max(1, len(text) - size + 1))
    piece = text[start : start + size]
    cut = piece if start == 0 else piece.partition(" ")[2] or piece
    return cut.strip() or piece


def _list(words: Sequence[str], length: int, draw: random.Random) -> str:
    count = draw.randint(3, max(3, length // (2 * _LINE)))
    lines = []
    for _ in range(count):
        name, kind, value = (draw.choice(words) for _ in range(3))
        lines.append(f"{name} {kind}: {value} {draw.randrange(10, 10_000)}")
    return "\n".join([*lines, "", *draw.sample(lines, len(lines))])
