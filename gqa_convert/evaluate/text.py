"""Text to measure on: read documents, turn them into one stream of tokens, and cut windows from it.

The stream keeps, for every token, how many UTF-8 bytes of text it stands for, so that a loss can be given per byte and
compared between tokenizers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median_high
from typing import Any

from gqa_convert.data.conversations import LOSSES, ChatTemplate, Conversation
from gqa_convert.errors import UsageError


@dataclass(frozen=True)
class TokenStream:
    """Tokens of all documents, joined.

    Attributes:
        ids: the tokens.
        sizes: for each the number of UTF-8 bytes that it stands for.
        scored: for each whether it is to be predicted; None for all of them.
        starts: where each document begins.
    """

    ids: list[int]
    sizes: list[int]
    scored: list[bool] | None = None
    starts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Window:
    """A stretch of the stream: `length` tokens from `start`, of which those from `first` on are scored (first >= 1)."""

    start: int
    length: int
    first: int

    @property
    def scored(self) -> range:
        """Places in the stream whose tokens this window scores."""
        return range(self.start + self.first, self.start + self.length)


def encode_conversations(documents: Sequence[str], tokenizer: Any, *, loss_on: str = LOSSES[0]) -> TokenStream:
    """Make conversations tokens by the tokenizer's chat template, and join them.

    Args:
        documents: conversations, all of them.
        tokenizer: a transformers tokenizer.
        loss_on: `assistant`: score what the assistant says; `all`: every token.

    Raises:
        UsageError: if there is text among them, or no template that can be followed.
    """
    template = ChatTemplate(tokenizer)
    ids: list[int] = []
    sizes: list[int] = []
    scored: list[bool] = []
    starts: list[int] = []
    for document in documents:
        if not isinstance(document, Conversation):
            raise UsageError("the data holds rows of messages and rows of text. Measure on them one after the other.")
        rendered = template.render(document, spans=loss_on == LOSSES[0])
        starts.append(len(ids))
        if rendered.ends is None:
            sizes += _even(len(rendered.text.encode()), len(rendered.ids))
        else:
            sizes += _sizes(rendered.text, ((0, end) for end in rendered.ends))
        ids += rendered.ids.tolist()
        scored += rendered.assistant.tolist()
    return TokenStream(ids, sizes, scored, starts)


def document_windows(stream: TokenStream, *, context: int, limit: int | None = None) -> list[Window]:
    """Windows that each hold one document, or `context` tokens of it; those in which nothing is scored are left out.

    Args:
        stream: with its documents' starts.
        context: tokens per window at most.
        limit: keep only this many windows, evenly spread.

    Raises:
        UsageError: if nothing is scored in any.
    """
    edges = [*stream.starts, len(stream.ids)]
    cut = []
    for start, end in pairwise(edges):
        for first in range(start, end - 1, context):
            length = min(context, end - first)
            inside = range(first + 1, first + length)
            if length > 1 and (stream.scored is None or any(stream.scored[i] for i in inside)):
                cut.append(Window(first, length, 1))
    if not cut:
        raise UsageError("no conversation of the data holds a turn of the assistant's to score.")
    if limit is not None and limit < len(cut):
        cut = [cut[i * len(cut) // limit] for i in range(limit)]
    return cut


def encode(documents: Iterable[str], tokenizer: Any, *, special: bool = True, eos: bool = True) -> TokenStream:
    """Tokenise documents and join them.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer.
        special: let the tokenizer add the special tokens it adds by default (BOS, for most that have one).
        eos: end every document with EOS, where the tokenizer has one and did not put it there itself.
    """
    ids: list[int] = []
    sizes: list[int] = []
    fast = bool(getattr(tokenizer, "is_fast", False))
    for document in documents:
        coded = tokenizer(document, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
        own = list(coded["input_ids"])
        sizes += _sizes(document, coded["offset_mapping"]) if fast else _even(len(document.encode()), len(own))
        ids += own
        if eos and tokenizer.eos_token_id is not None and (not own or own[-1] != tokenizer.eos_token_id):
            ids.append(tokenizer.eos_token_id)
            sizes.append(0)
    return TokenStream(ids, sizes)


def _sizes(document: str, offsets: Iterable[tuple[int, int]]) -> list[int]:
    """Give each token the bytes from the end of the one before it to its own end, so that every byte counts once.

    Tokens of one character's bytes share an offset, and spaces that a tokenizer drops belong to none.
    """
    sizes, done = [], 0
    for _, end in offsets:
        sizes.append(len(document[done:end].encode("utf-8", "surrogatepass")) if end > done else 0)
        done = max(done, end)
    return sizes


def _even(total: int, count: int) -> list[int]:
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def windows(total: int, *, context: int, stride: int, limit: int | None = None) -> list[Window]:
    """Cut a stream of `total` tokens into windows of `context` tokens, one every `stride`.

    Each token is scored once, in the first window that holds it behind another token. With `stride == context` the
    windows lie side by side, each scores its own `context - 1` next tokens, and a tail that fills no window is left
    out; otherwise the last window is moved back so that it ends with the stream.

    Args:
        total: tokens in the stream.
        context: tokens per window.
        stride: tokens from one window to the next.
        limit: keep only this many windows, evenly spread.

    Raises:
        UsageError: if the numbers do not fit together, or the stream has fewer than two tokens.
    """
    if context < 2 or not 1 <= stride <= context:
        raise UsageError(f"--context {context} --stride {stride}: need 1 <= stride <= context and context >= 2.")
    if total < 2:
        raise UsageError(f"the text has {total} tokens; at least two are needed to predict one from another.")
    context = min(context, total)
    cut = []
    done = 0
    start = 0
    while start + context <= total:
        cut.append(Window(start, context, max(done - start, 1)))
        done = start + context
        start += stride
    if stride < context and done < total:
        cut.append(Window(total - context, context, done - (total - context)))
    if limit is not None and limit < len(cut):
        cut = [cut[i * len(cut) // limit] for i in range(limit)]
    return cut


def overlapping(cut: Sequence[Window]) -> int:
    """How many neighbouring windows share text, itself included: 2 for windows every half window, 1 side by side.

    The usual number where it is not the same everywhere.
    """
    starts = [window.start for window in cut]
    return median_high(bisect_left(starts, window.start + window.length) - i for i, window in enumerate(cut))
