"""Recall against context: what a model finds again in a long text, which loss over running text hardly shows.

Three tasks of the kinds of RULER (Hsieh et al. 2024, arXiv 2404.06654), written here:

    needle     one number is told somewhere in the text, and asked for at its end
    keys       the numbers of several keys are told, and one is asked for
    variables  a value is handed on from variable to variable, beside another chain; the last one's is asked for

Every model gets the same items: exactly as many tokens as the context, what is told spread evenly over the depths, text
of the evaluation around it. An item is right if each token of the answer is the first choice behind those before it,
which is what greedy generation writes; so it takes one pass and no generation.

Shapes: B items, T tokens.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_convert.data import reading
from gqa_convert.errors import UsageError
from gqa_convert.evaluate import models, text
from gqa_convert.evaluate.evaluation import EvalSettings
from gqa_convert.evaluate.figures import with_means
from gqa_convert.evaluate.metrics import RECALL
from gqa_convert.evaluate.results import Evaluation, Recall

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Rome", "Quito", "Tunis", "Paris", "Kyoto", "Dublin", "Accra")
KEYS = 4
"""Keys of which one is asked for."""
HOPS = 3
"""Variables that a value is handed on through."""


@dataclass(frozen=True)
class Item:
    """One question: what is told, in this order, what is asked, and what should follow."""

    told: tuple[str, ...]
    asked: str
    answer: str


def make_item(kind: str, draw: random.Random) -> Item:
    """Draw an item of a kind."""
    if kind == "variables":
        names = draw.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 2 * HOPS)
        chains = [(names[:HOPS], _number(draw)), (names[HOPS:], _number(draw))]
        told = [
            f"VAR {name} = {value if not at else f'VAR {chain[at - 1]}'}."
            for at in range(HOPS)
            for chain, value in chains
            for name in (chain[at],)
        ]
        chain, value = chains[0]
        return Item(tuple(told), f"The value that was assigned to VAR {chain[-1]}, followed back, is", f" {value}")
    cities = draw.sample(CITIES, KEYS if kind == "keys" else 1)
    numbers = [_number(draw) for _ in cities]
    wanted = draw.randrange(len(cities))
    told = [f"The special magic number for {c} is {n}." for c, n in zip(cities, numbers, strict=True)]
    return Item(tuple(told), f"The special magic number for {cities[wanted]} is", f" {numbers[wanted]}")


def _number(draw: random.Random) -> int:
    return draw.randrange(10_000, 100_000)


def placed(item: Item, tokenizer: Any, text_ids: Sequence[int], context: int, depth: float) -> tuple[list[int], int]:
    """Put an item into text: ids of exactly `context` tokens, and how many at their end are the answer.

    Args:
        item: what to place.
        tokenizer: of the models.
        text_ids: text to fill up with, taken from a beginning that the caller has chosen, over and over if it is short.
        context: tokens.
        depth: of what is told first, 0 (the beginning) to 1; several things are told evenly spread from there on.

    Raises:
        UsageError: if the context is too short to hold it.
    """

    def encode(words: str) -> list[int]:
        ids: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"]
        return ids

    start = list(tokenizer("")["input_ids"])
    if tokenizer.eos_token_id in start:
        start.remove(tokenizer.eos_token_id)
    told = [encode(f"\n{line}\n") for line in item.told]
    asked, answer = encode(f"\n{item.asked}"), encode(item.answer)
    room = context - sum(map(len, (start, *told, asked, answer)))
    if room < len(told):
        raise UsageError(f"--recall {context}: too few tokens for a question and some text around it.")
    filler = [text_ids[i % len(text_ids)] for i in range(room)]
    ids, done = start, 0
    for number, line in enumerate(told):
        until = round(room * (depth + (1 - depth) * number / len(told)))
        ids = ids + filler[done:until] + line
        done = until
    return ids + filler[done:] + asked + answer, len(answer)


def make_items(
    kind: str, tokenizer: Any, text_ids: Sequence[int], context: int, *, count: int, seed: int = 0
) -> list[tuple[list[int], int]]:
    """Draw `count` items of a kind and place them, from the beginning of the text to its end."""
    draw = random.Random(f"{seed} {kind} {context}")
    items = []
    for number in range(count):
        begin = draw.randrange(len(text_ids))
        around = [*text_ids[begin:], *text_ids[:begin]]
        items.append(placed(make_item(kind, draw), tokenizer, around, context, number / count))
    return items


@torch.inference_mode()
def right(model: Any, items: Sequence[tuple[list[int], int]]) -> list[bool]:
    """Which items a model answers: every token of the answer its first choice."""
    device = next(model.parameters()).device
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    answered = []
    for ids, length in items:
        ids_BT = torch.tensor([ids[:-1]], device=device)
        kept = {"logits_to_keep": length} if keeps else {}
        logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False, **kept).logits[:, -length:]
        answered.append(logits_BTV.argmax(-1)[0].tolist() == ids[-length:])
    return answered


def recall_of(
    model: Any,
    name: str,
    tokenizer: Any,
    text_ids: Sequence[int],
    contexts: Sequence[int],
    *,
    count: int,
    on_items: Callable[[int], None] | None = None,
) -> list[Recall]:
    """Every kind at every context, for one model."""
    results = []
    for context in contexts:
        for kind in RECALL:
            answered = right(model, make_items(kind, tokenizer, text_ids, context, count=count))
            results.append(Recall(model=name, kind=kind, context=context, right=tuple(answered)))
            if on_items is not None:
                on_items(count)
    return results


def with_recall(
    evaluation: Evaluation,
    folders: Sequence[str | Path],
    contexts: Sequence[int],
    settings: EvalSettings,
    *,
    count: int,
    on_items: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure recall of an evaluation's models, one in memory at a time, and add it.

    Args:
        evaluation: of the same models.
        folders: the models, the original first.
        contexts: tokens of an item.
        settings: of the evaluation; its text stands around what is told.
        count: items of each kind at each context.
        on_items: called with the number of items answered since the last call.

    Raises:
        UsageError: for encoder-decoders, a context that a model is not made for, or data without plain text.
    """
    subjects = [models.subject(str(folder), trust_remote_code=settings.trust_remote_code) for folder in folders]
    for subject in subjects:
        if subject.is_encoder_decoder:
            raise UsageError(f"--recall: {subject.name} is an encoder-decoder model, which does not go on with a text.")
        if subject.max_context is not None and max(contexts) > subject.max_context:
            raise UsageError(f"--recall {max(contexts)}: {subject.name} is made for {subject.max_context} tokens.")
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise UsageError(f"--recall: two models are called {max(names, key=names.count)}: rename a folder.")
    tokenizer = subjects[0].source.tokenizer()
    text_ids = text.encode(plain_documents(settings, "--recall"), tokenizer, special=False, eos=False).ids
    recall: list[Recall] = []
    for subject in subjects:
        model = models.load(subject, dtype=settings.dtype, device=settings.device)
        recall += recall_of(model, subject.name, tokenizer, text_ids, contexts, count=count, on_items=on_items)
        del model
    return with_figures(evaluation, recall)


def usual_contexts(base: str | Path, *, trust_remote_code: bool = False) -> str:
    """The contexts that are asked at where the user names none: 1k and 2k, as far as a model is made for them.

    Empty for an encoder-decoder, which is not asked.
    """
    subject = models.subject(str(base), trust_remote_code=trust_remote_code)
    if subject.is_encoder_decoder:
        return ""
    longest = subject.max_context
    return ",".join(str(context) for context in (1024, 2048) if longest is None or context <= longest)


def plain_documents(settings: EvalSettings, flag: str) -> list[str]:
    """The plain texts of an evaluation's data.

    Raises:
        UsageError: if it holds conversations alone.
    """
    documents = reading.read_documents(settings.data, field=settings.field, separator=settings.separator)
    plain = [document for document in documents if isinstance(document, str)]
    if not plain:
        raise UsageError(f"{flag}: {settings.data} holds conversations alone; give plain text by --data.")
    return plain


def with_figures(evaluation: Evaluation, recall: Sequence[Recall]) -> Evaluation:
    """Add recall to an evaluation: each answer, and as figures of every model the shares over all contexts."""
    own: dict[str, dict[str, list[float]]] = {}
    for result in recall:
        kinds = own.setdefault(result.model, {})
        kinds.setdefault(f"recall_{result.kind}", []).extend(float(x) for x in result.right)
    return with_means(evaluation, own, recall=tuple(recall))
