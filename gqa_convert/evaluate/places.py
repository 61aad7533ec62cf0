"""Where two models differ: by kind of token, and by how much text stands before it in its window.

A token is sorted by its text. `word` is the first token of a word, `word piece` one that goes on with it: letters
behind a token that ends in a letter, without white space between. Where words are written without spaces, every token
but the first of a stretch is a piece. What holds a digit is a `number`; a newline or an indentation `white space`.

Shapes: B examples, T targets, V vocabulary, P parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gqa_convert.evaluate.intervals import means_per_token
from gqa_convert.evaluate.metric import Figure
from gqa_convert.evaluate.results import KINDS, Part

if TYPE_CHECKING:
    from gqa_convert.evaluate.examples import Batch, Example
    from gqa_convert.evaluate.scoring import WindowSums

SHOWN = ("loss", "kl", "top1_agreement")
"""Metrics that are told apart by place."""
_FIRST = 16
"""Tokens in the first part of a window; each further one is as long as all before it."""
_SPACE = ("▁", "Ġ")
"""How sentencepiece and byte-level BPE write a space in front of a token."""


def kind_of(text: str) -> str:
    """The kind of a token by its text: `word` for the beginning of a word and for its pieces."""
    if not text.strip():
        return "white space"
    if any(character.isnumeric() for character in text):
        return "number"
    # A part of a character, of which several tokens make one, is shown as U+FFFD.
    if any(character.isalpha() or character == "\ufffd" for character in text):
        return "word"
    return "punctuation"


class Places:
    """Sorts targets into parts.

    Args:
        tokenizer: of the models.
        examples: what will be scored; only their tokens are looked up.
    """

    def __init__(self, tokenizer: Any, examples: Sequence[Example]) -> None:
        ids = sorted({i for example in examples for x in (example.targets, _before(example)) for i in x.tolist()})
        size = ids[-1] + 1
        self._kind_V = torch.zeros(size, dtype=torch.long)
        self._joins_V = torch.zeros(size, dtype=torch.bool)
        self._ends_V = torch.zeros(size, dtype=torch.bool)
        special = set(tokenizer.all_special_ids)
        for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
            space = str(piece).startswith(_SPACE) or text[:1].isspace()
            kind = "special" if i in special or piece is None else kind_of(text)
            self._kind_V[i] = KINDS.index(kind)
            self._joins_V[i] = kind == "word" and not space
            self._ends_V[i] = kind == "word" and (text[-1].isalpha() or text[-1] == "\ufffd")
        longest = max(len(example.targets) for example in examples)
        self._edges = [1, _FIRST]
        while self._edges[-1] <= longest:
            self._edges.append(2 * self._edges[-1])

    @property
    def names(self) -> list[tuple[str, str]]:
        """What each part is sorted by, and its name: kinds, then tokens before the target."""
        positions = [("position", f"{low}-{high - 1}") for low, high in pairwise(self._edges)]
        return [("kind", kind) for kind in KINDS] + positions

    def add(self, sums: WindowSums, batch: Batch, values: Mapping[str, Tensor]) -> None:
        """Add a batch to the sums of each window's parts.

        Args:
            sums: of one model.
            batch: what was scored.
            values: by metric (B, T), 0 where a token is not scored.
        """
        kind_BT, position_T = self._sort(batch)
        scored_BT = batch.scored.double()

        def by_part(value_BT: Tensor) -> list[Tensor]:
            parts_BP = value_BT.new_zeros(len(value_BT), len(self.names))
            parts_BP.scatter_add_(1, kind_BT, value_BT)
            parts_BP.index_add_(1, position_T, value_BT)
            return list(parts_BP)

        sums.part_tokens += by_part(scored_BT)
        for name in SHOWN:
            if name in values:
                sums.part_sums.setdefault(name, []).extend(by_part(values[name].cpu()))

    def _sort(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The parts of a batch's targets, as places in `names`: by kind (B, T), and by position (T,)."""
        kind_BT = self._kind_V[batch.targets]
        inside_BT = self._joins_V[batch.targets] & self._ends_V[_before(batch)]
        kind_BT = torch.where(inside_BT, KINDS.index("word piece"), kind_BT)
        before_T = torch.arange(1, batch.targets.shape[1] + 1)
        position_T = torch.bucketize(before_T, torch.tensor(self._edges[1:]), right=True)
        return kind_BT, position_T + len(KINDS)


def _before(example: Example | Batch) -> Tensor:
    """The token before each target."""
    inputs = example.inputs
    before: Tensor = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
    return before


def parts(places: Places, original: WindowSums, converted: WindowSums, *, block: int) -> tuple[Part, ...]:
    """The figures of a pair in every part that holds a token.

    Args:
        places: what the windows were sorted by.
        original: the original's sums.
        converted: the conversion's sums, over the same windows.
        block: neighbouring windows that are drawn together, see `intervals`.
    """
    found = []
    total = sum(converted.sums["kl"])
    tokens_PW = _by_part(converted.part_tokens)
    before, after = (_by_part(sums.part_sums["loss"]) for sums in (original, converted))
    kl, agreed = (_by_part(converted.part_sums[name]) for name in ("kl", "top1_agreement"))
    for p, (by, name) in enumerate(places.names):
        # Windows without such a token are not drawn: a draw of them alone would say nothing.
        kept = [w for w, tokens in enumerate(tokens_PW[p]) if tokens]
        if not kept:
            continue
        tokens = [int(tokens_PW[p][w]) for w in kept]
        columns = [
            [after[p][w] - before[p][w] for w in kept],
            [kl[p][w] for w in kept],
            [agreed[p][w] for w in kept],
        ]
        estimates = means_per_token(columns, tokens, block=min(block, len(kept)))
        rise, divergence, agreement = (Figure(each.value, (each.low, each.high)) for each in estimates)
        found.append(
            Part(
                by=by,
                name=name,
                tokens=sum(tokens),
                loss=sum(before[p]) / sum(tokens),
                loss_difference=rise,
                kl=divergence,
                top1_agreement=agreement,
                kl_share=sum(kl[p]) / total if total > 0 else 0.0,
            )
        )
    return tuple(found)


def _by_part(windows: Sequence[Tensor]) -> list[list[float]]:
    """Sums of each part, window by window, from those of each window."""
    by_part: list[list[float]] = torch.stack(list(windows), 1).tolist()
    return by_part
