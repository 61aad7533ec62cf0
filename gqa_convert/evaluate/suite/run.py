"""Run the suite on an evaluation's models, one in memory at a time, and add what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.errors import UsageError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.evaluation import EvalSettings
from gqa_convert.evaluate.figures import with_means
from gqa_convert.evaluate.metrics import row
from gqa_convert.evaluate.recall import plain_documents
from gqa_convert.evaluate.results import Evaluation, SuiteResult
from gqa_convert.evaluate.suite.answering import agreed, greedy, likelihoods, result_of, until
from gqa_convert.evaluate.suite.items import GENERATED, Choice, continuations
from gqa_convert.evaluate.suite.sandbox import can_confine

KINDS = ("continuations", "agreement", *GENERATED)
"""What the suite asks a model that goes on with a text, beside recall."""
ANSWERED = ("rouge", "wer")
"""What it measures of an encoder-decoder that reads text, and of one that listens."""
AGREED_TOKENS = 64
"""Tokens that both models write at most for `agreement`, and tokens of text that they go on with."""


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """What to run.

    Attributes:
        kinds: of `KINDS` or `ANSWERED`; by default all that suit the models, without `code` where code cannot be
            confined.
        count: items of each kind; of `code` at most as many as there are.
        seed: of the draw of items.
    """

    kinds: tuple[str, ...] = ()
    count: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in (*KINDS, *ANSWERED)]
        if unknown:
            raise UsageError(f"--suite-kinds {unknown[0]}: choose from {', '.join((*KINDS, *ANSWERED))}.")
        if self.count < 1:
            raise UsageError("--suite-items must be at least 1.")
        if "code" in self.kinds and not can_confine():
            raise UsageError(
                "--suite-kinds code: this system cannot confine what a model writes (that takes Linux with seccomp on "
                "x86-64 or arm64). Leave it out."
            )

    def chosen(self, subject: models.Subject) -> tuple[str, ...]:
        """The kinds that are run on a model.

        Raises:
            UsageError: if one is asked for that does not suit it.
        """
        suited: tuple[str, ...]
        if subject.is_encoder_decoder:
            does, suited = "answers or transcribes", ("wer",) if subject.listens else ("rouge",)
        else:
            does, suited = "goes on with a text", tuple(kind for kind in KINDS if kind != "code" or can_confine())
        unfit = next((kind for kind in self.kinds if kind not in suited), None)
        if unfit:
            raise UsageError(f"--suite-kinds {unfit}: {subject.name} {does}; choose from {', '.join(suited)}.")
        return self.kinds or suited


def with_suite(
    evaluation: Evaluation,
    folders: Sequence[str | Path],
    settings: EvalSettings,
    suite: SuiteSettings,
    *,
    on_items: Callable[[int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run the suite and add it to an evaluation of the same models.

    Args:
        evaluation: of the same models.
        folders: the models, the original first.
        settings: of the evaluation; its text is what items are drawn from.
        suite: what to run.
        on_items: called with the number of items done since the last call.
        on_total: called once with the number of items of all models.

    Raises:
        UsageError: for a kind that does not suit the models, a model made for fewer tokens than an item takes, or too
            little plain text; where encoder-decoders are measured, if the library for it is not installed.
    """
    subjects = [models.subject(str(folder), trust_remote_code=settings.trust_remote_code) for folder in folders]
    kinds = suite.chosen(subjects[0])
    mixed = next(
        (subject for subject in subjects if subject.is_encoder_decoder != subjects[0].is_encoder_decoder), None
    )
    if mixed is not None:
        raise UsageError(f"--suite: {mixed.name} is no conversion of {subjects[0].name}: one of them has an encoder.")
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise UsageError(f"--suite: two models are called {max(names, key=names.count)}: rename a folder.")
    if subjects[0].is_encoder_decoder:
        from gqa_convert.evaluate.suite.outputs import answers

        results = answers(
            subjects, settings, count=suite.count, context=evaluation.context, on_items=on_items, on_total=on_total
        )
        return with_figures(evaluation, results, suite)
    words = " ".join(plain_documents(settings, "--suite")).split()
    tokenizer = subjects[0].source.tokenizer()
    items: dict[str, Any] = {}
    for kind in kinds:
        if kind == "continuations":
            items[kind] = continuations(words, count=suite.count, seed=suite.seed)
        elif kind == "agreement":
            items[kind] = _prompts(words, tokenizer, suite.count)
        else:
            items[kind] = GENERATED[kind](words, count=suite.count, seed=suite.seed)
    _check_lengths(subjects, tokenizer, items)
    if on_total is not None:
        on_total(sum(map(len, items.values())) * len(subjects))
    results = []
    originals: list[list[int]] | None = None
    for subject in subjects:
        model = models.load(subject, dtype=settings.dtype, device=settings.device)
        for kind in kinds:
            if kind == "agreement":
                written = greedy(model, tokenizer, items[kind], tokens=AGREED_TOKENS, batch=settings.batch_size)
                originals = originals or written
                lengths = [agreed(one, two) for one, two in zip(originals, written, strict=True)]
                results.append(result_of(subject.name, kind, lengths, tokenizer.batch_decode(written)))
            elif kind == "continuations":
                results += _chosen(model, subject, tokenizer, items[kind])
            else:
                results.append(_written(model, subject, tokenizer, kind, items[kind], settings.batch_size))
            if on_items is not None:
                on_items(len(items[kind]))
        del model
    return with_figures(evaluation, results, suite)


def with_figures(evaluation: Evaluation, results: Sequence[SuiteResult], suite: SuiteSettings) -> Evaluation:
    """Add results to an evaluation: each item's, and as figures of every model the means."""
    own: dict[str, dict[str, list[float]]] = {}
    of_pair: dict[str, dict[str, list[float]]] = {}
    for result in results:
        table = of_pair if row(f"suite_{result.kind}").of == "pair" else own
        table.setdefault(result.model, {})[f"suite_{result.kind}"] = list(result.scores)
    return with_means(
        evaluation,
        own,
        of_pair,
        sizes={f"suite_{result.kind}": result.sizes for result in results},
        suite=tuple(results),
        settings=evaluation.settings | {"suite_seed": suite.seed},
    )


def _prompts(words: Sequence[str], tokenizer: Any, count: int) -> list[list[int]]:
    """Stretches of the text, evenly spread, all of one length."""
    ids = list(tokenizer(" ".join(words), add_special_tokens=False, verbose=False)["input_ids"])
    start = [i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id]
    room = len(ids) - AGREED_TOKENS
    if room < 0:
        raise UsageError(f"--suite: {AGREED_TOKENS} tokens of plain text are needed; --data has {len(ids)}.")
    places = [room * i // max(count - 1, 1) for i in range(count)]
    return [start + ids[place : place + AGREED_TOKENS] for place in places]


def _check_lengths(subjects: Sequence[models.Subject], tokenizer: Any, items: dict[str, Any]) -> None:
    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    for kind, asked in items.items():
        if kind == "agreement":
            most = max(map(len, asked)) + AGREED_TOKENS
        elif kind == "continuations":
            most = max(tokens(item.context + choice) for item in asked for choice in item.choices)
        else:
            most = max(tokens(item.prompt) + item.tokens for item in asked)
        for subject in subjects:
            if subject.max_context is not None and most > subject.max_context:
                raise UsageError(
                    f"--suite: {kind} takes {most} tokens and {subject.name} is made for {subject.max_context}. Leave "
                    "it out by --suite-kinds."
                )


def _chosen(model: Any, subject: models.Subject, tokenizer: Any, items: Sequence[Choice]) -> list[SuiteResult]:
    """Whether the true continuation is the likeliest, as it is and by its length in characters, as lm-eval counts."""
    plain, by_length = [], []
    for item in items:
        values = likelihoods(model, tokenizer, item)
        per_character = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
        plain.append(values.index(max(values)) == item.answer)
        by_length.append(per_character.index(max(per_character)) == item.answer)
    return [
        result_of(subject.name, "continuations", plain),
        result_of(subject.name, "continuations_by_length", by_length),
    ]


def _written(
    model: Any, subject: models.Subject, tokenizer: Any, kind: str, items: Sequence[Any], batch: int
) -> SuiteResult:
    prompts = [list(tokenizer(item.prompt)["input_ids"]) for item in items]
    prompts = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in prompts]
    written = greedy(model, tokenizer, prompts, tokens=items[0].tokens, stops=items[0].stops, batch=batch)
    texts = [
        until(tokenizer.decode(ids, skip_special_tokens=True), item.stops)
        for ids, item in zip(written, items, strict=True)
    ]
    right = [item.right(text) for text, item in zip(texts, items, strict=True)]
    return result_of(subject.name, kind, right, texts)
