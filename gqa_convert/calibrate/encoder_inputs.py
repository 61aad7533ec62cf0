"""Calibration inputs of an encoder-decoder: one document to an input, as such a model is used, not joined text.

Rows of one length make a batch without padding, so that no mask is needed and no pad is counted. To keep the lengths
few, a row is cut to the next shorter of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... tokens.

Shape suffixes: N rows, S encoder positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy import transformers_api
from gqa_convert.calibrate.documents import documents
from gqa_convert.calibrate.tokens import load_tokenizer
from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST = 4
"""Shorter documents say too little to be worth a batch of their own."""


def shorter(length: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, ... (powers of two and half as much again) that is at most `length`."""
    power = 1 << (length.bit_length() - 1)
    return power + power // 2 if power + power // 2 <= length else power


def document_rows(
    data: str, tokenizer_folder: Path, *, tokens: int, length: int, seed: int = 0, trust_remote_code: bool = False
) -> list[Tensor]:
    """Tokenise documents from all over a text source, each by itself; longer ones than `length` in several rows.

    Args:
        data: as `gqa_convert.data.named.source_named` takes it.
        tokenizer_folder: a folder with the model's tokenizer.
        tokens: wanted in all; a smaller source gives fewer.
        length: the longest row, its special tokens included.
        seed: for the choice of documents.
        trust_remote_code: allow the tokenizer's own code to run.

    Returns:
        ids_NS, int64, one tensor a length, shortest first.

    Raises:
        UsageError: if no document has as many as four tokens, or the folder has no tokenizer.
        HubError: if a hub dataset cannot be read.
    """
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
    rows: list[list[int]] = []
    left = tokens
    for text in documents(data, seed=seed):
        for row in _rows(tokenizer, text, length):
            rows.append(row)
            left -= len(row)
        if left <= 0:
            break
    if not rows:
        raise UsageError(f"{data}: no document has {SHORTEST} tokens or more. Use other text.")
    return by_length(rows)


def by_length(rows: Iterable[Sequence[int]]) -> list[Tensor]:
    """Stack rows of one length, shortest first."""
    import torch

    found: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        found.setdefault(len(row), []).append(row)
    return [torch.tensor(found[length], dtype=torch.long) for length in sorted(found)]


def _rows(tokenizer: Any, text: str, length: int) -> Iterator[list[int]]:
    """One document's ids, each row between the special tokens that the tokenizer puts around a text."""
    with transformers_api.quiet():
        whole: list[int] = list(tokenizer(text)["input_ids"])
        bare: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
    if start is None or not bare:
        bare, before, after = whole, [], []
    else:
        before, after = whole[:start], whole[start + len(bare) :]
    room = max(1, length - len(before) - len(after))
    for place in range(0, len(bare), room):
        part = bare[place : place + room]
        kept = shorter(len(part) + len(before) + len(after)) - len(before) - len(after)
        if kept + len(before) + len(after) >= SHORTEST and kept > 0:
            yield [*before, *part[:kept], *after]
