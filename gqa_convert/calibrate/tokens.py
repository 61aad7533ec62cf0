"""Calibration tokens: windows of text as the model would meet it.

Shape suffixes: N windows, T tokens per window, S positions of an encoder.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gqa_convert.data.conversations import ChatTemplate, Conversation
from gqa_convert.data.sampling import documents
from gqa_convert.errors import UsageError
from gqa_convert.hf import api

if TYPE_CHECKING:
    from torch import Tensor

    Inputs = Tensor | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]

SEQUENCES = 128
LENGTH = 2048
"""Defaults: 128 windows of 2048 tokens (as Jin et al. 2024, arXiv 2412.20677, calibrate)."""


def window_plan(max_length: int | None, *, sequences: int = SEQUENCES, length: int = LENGTH) -> tuple[int, int]:
    """Return (sequences, length) for a model of `max_length` positions: as many tokens, in shorter windows."""
    if max_length is None or max_length >= length:
        return sequences, length
    return -(-sequences * length // max_length), max_length


def calibration_tokens(
    data: str, tokenizer: Any, *, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0
) -> Tensor:
    """Return windows of tokens drawn from all over a text source.

    Documents are tokenised as the tokenizer gives them, with its EOS after each (where it has one and did not add it),
    joined and cut; conversations as the tokenizer's chat template gives them.

    Args:
        data: a file, a folder or a hub dataset; see `gqa_convert.data.sampling.documents`.
        tokenizer: the model's (`gqa_convert.hf.loading.load_tokenizer`).
        sequences: windows wanted; a smaller source gives fewer.
        length: tokens per window.
        seed: for the choice of documents.

    Returns:
        ids_NT, int64, 1 <= N <= sequences.

    Raises:
        UsageError: if the source does not fill one window, or holds conversations and there is no template.
        HubError: if a hub dataset cannot be read.
    """
    import torch

    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in documents(data, seed=seed):
        if isinstance(text, Conversation):  # the template says how it ends
            ids += template_ids(text, tokenizer, data)
            if len(ids) >= sequences * length:
                break
            continue
        with api.quiet():
            ids += tokenizer(text)["input_ids"]
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        if len(ids) >= sequences * length:
            break
    whole = min(sequences, len(ids) // length)
    if whole == 0:
        raise UsageError(f"{data}: gives {len(ids)} tokens, less than one window of {length}. Use more text.")
    return torch.tensor(ids[: whole * length], dtype=torch.long).view(whole, length)


def template_ids(document: Conversation, tokenizer: Any, data: str) -> list[int]:
    """A conversation's tokens by the tokenizer's chat template.

    Raises:
        UsageError: naming `data`, if there is none or it refuses the conversation.
    """
    try:
        with api.quiet():
            ids: list[int] = ChatTemplate(tokenizer).render(document, spans=False).ids.tolist()
    except UsageError as error:
        raise UsageError(f"{data}: {str(error).removeprefix('data: ')}") from error
    return ids


def token_hash(inputs: Inputs) -> str:
    """SHA-256 of calibration inputs, for keys of caches."""
    digest = hashlib.sha256()
    for parts in of_one_shape(inputs):
        for name in sorted(parts):
            digest.update(f"{name} {tuple(parts[name].shape)} {parts[name].dtype} ".encode())
            digest.update(parts[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def of_one_shape(inputs: Inputs) -> list[dict[str, Tensor]]:
    """Calibration inputs as arguments by name, a list entry for every shape there is."""
    if isinstance(inputs, Mapping):
        return [dict(inputs)]
    return [dict(parts) for parts in inputs] if isinstance(inputs, Sequence) else [{"input_ids": inputs}]


def batches(inputs: Inputs, size: int | Callable[[Mapping[str, Tensor]], int]) -> list[dict[str, Tensor]]:
    """Cut calibration inputs into the arguments of forward passes over `size` windows each (the last perhaps fewer).

    Where there are several shapes, `size` may be a function of one of them, and their batches are mixed.
    """
    cut_batches: list[dict[str, Tensor]] = []
    shapes = of_one_shape(inputs)
    for parts in shapes:
        cut = {name: tensor.split(size(parts) if callable(size) else size) for name, tensor in parts.items()}
        count = len(next(iter(cut.values())))
        cut_batches += [{name: pieces[i] for name, pieces in cut.items()} for i in range(count)]
    if len(shapes) > 1:
        random.Random(0).shuffle(cut_batches)  # the last are held out of a refit, and should be like the others
    return cut_batches


SHORTEST = 4
"""Shorter documents say too little to be worth a batch of their own."""


def shorter(length: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, ... (powers of two and half as much again) that is at most `length`."""
    power = 1 << (length.bit_length() - 1)
    return power + power // 2 if power + power // 2 <= length else power


def document_rows(data: str, tokenizer: Any, *, tokens: int, length: int, seed: int = 0) -> list[Tensor]:
    """Tokenise documents from all over a text source, each by itself; longer ones than `length` in several rows.

    Args:
        data: as `gqa_convert.data.named.source_named` takes it.
        tokenizer: the model's (`gqa_convert.hf.loading.load_tokenizer`).
        tokens: wanted in all; a smaller source gives fewer.
        length: the longest row, its special tokens included.
        seed: for the choice of documents.

    Returns:
        ids_NS, int64, one tensor a length, shortest first.

    Raises:
        UsageError: if no document has as many as four tokens.
        HubError: if a hub dataset cannot be read.
    """
    rows: list[list[int]] = []
    left = tokens
    for text in documents(data, seed=seed):
        if isinstance(text, Conversation):
            raise UsageError(f"{data}: holds conversations, and an encoder-decoder reads single texts. Give it text.")
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

    rows_of_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        rows_of_length.setdefault(len(row), []).append(row)
    return [torch.tensor(rows_of_length[length], dtype=torch.long) for length in sorted(rows_of_length)]


def _rows(tokenizer: Any, text: str, length: int) -> Iterator[list[int]]:
    """One document's ids, each row between the special tokens that the tokenizer puts around a text."""
    with api.quiet():
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
