"""The items of the suite, drawn under a seed: every model gets the same. Imports no torch."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gqa_convert.errors import UsageError
from gqa_convert.evaluate.suite.code_items import ITEMS, STOPS, CodeItem
from gqa_convert.evaluate.suite.sandbox import passes

CHOICES = 4
"""Continuations of which one is the true one."""
CONTEXT_WORDS, CHOICE_WORDS, COPIED_WORDS = 40, 10, 8
_WORDS = ("apple", "river", "stone", "cloud", "lamp", "bread", "horse", "glass", "paper", "tiger", "music", "green")


@dataclass(frozen=True)
class Choice:
    """A text and several ways it might go on; `answer` is the place of the true one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Asked:
    """A text to go on with, where to stop, how long at most, and whether what came is right."""

    prompt: str
    stops: tuple[str, ...]
    tokens: int
    right: Callable[[str], bool]


def continuations(words: Sequence[str], *, count: int, seed: int = 0) -> list[Choice]:
    """Draw `count` items: where a text goes on, among continuations from elsewhere in it.

    Raises:
        UsageError: if there are too few words to draw from.
    """
    span = CONTEXT_WORDS + CHOICE_WORDS
    if len(words) < span * (CHOICES + 1):
        raise UsageError(f"--suite: {span * (CHOICES + 1)} words of plain text are needed; --data has {len(words)}.")
    draw = random.Random(f"{seed} continuations")
    items = []
    for _ in range(count):
        start = draw.randrange(len(words) - span + 1)
        cut = start + CONTEXT_WORDS
        elsewhere = [i for i in (draw.randrange(len(words) - CHOICE_WORDS + 1) for _ in range(1000))
                     if i + CHOICE_WORDS <= start or i >= start + span]  # fmt: skip
        true = " " + " ".join(words[cut : cut + CHOICE_WORDS])
        others = dict.fromkeys(" " + " ".join(words[i : i + CHOICE_WORDS]) for i in elsewhere)
        others.pop(true, None)
        if len(others) < CHOICES - 1:
            raise UsageError("--suite: the text of --data repeats itself too much to draw continuations from.")
        choices = list(others)[: CHOICES - 1]
        answer = draw.randrange(CHOICES)
        choices.insert(answer, true)
        items.append(Choice(" ".join(words[start:cut]), tuple(choices), answer))
    return items


def write_lm_eval_task(items: Sequence[Choice], folder: Path, name: str = "continuations") -> Path:
    """Write items as a task of lm-evaluation-harness: `lm_eval --tasks` or `gqa eval --tasks` takes the .yaml."""
    rows = [{"context": item.context, "choices": list(item.choices), "answer": item.answer} for item in items]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = folder / f"{name}.yaml"
    task.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {json.dumps(str(data))}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_target: answer\n'
        'doc_to_choice: choices\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        encoding="utf-8",
    )
    return task


def arithmetic(words: Sequence[str], *, count: int, seed: int = 0) -> list[Asked]:
    """Sums and differences of numbers below 100, after four that are done."""
    draw = random.Random(f"{seed} arithmetic")

    def sum_of() -> tuple[str, str]:
        a, b = draw.randrange(2, 100), draw.randrange(2, 100)
        a, b, sign = (a, b, "+") if draw.random() < 0.5 else (max(a, b), min(a, b), "-")
        return f"{a} {sign} {b} =", str(a + b if sign == "+" else a - b)

    return _shown(sum_of, count, 4, "", tokens=8, right=lambda written, answer: written.strip() == answer)


def copying(words: Sequence[str], *, count: int, seed: int = 0) -> list[Asked]:
    """Words of the text and a number, to be written once more, after two that are done."""
    draw = random.Random(f"{seed} copying")
    plain = [word for word in words if word.isalpha()] or list(_WORDS)

    def line() -> tuple[str, str]:
        start = draw.randrange(max(1, len(plain) - COPIED_WORDS))
        text = " ".join([*plain[start : start + COPIED_WORDS], str(draw.randrange(1000, 10_000))])
        return f"Line: {text}\nCopy:", text

    return _shown(
        line, count, 2, "Copy each line.\n\n", tokens=64, right=lambda written, answer: written.strip() == answer
    )


def repair(words: Sequence[str], *, count: int, seed: int = 0) -> list[Asked]:
    """JSON with one fault, to be written right, after three that are done."""
    draw = random.Random(f"{seed} json")

    def broken() -> tuple[str, str]:
        value: dict[str, Any] = {word: draw.randrange(100) for word in draw.sample(_WORDS, 2)}
        value[draw.choice(("name", "kind", "colour"))] = draw.choice(_WORDS)
        if draw.random() < 0.5:
            value["list"] = [draw.randrange(10) for _ in range(3)]
        text = json.dumps(value)
        first = next(iter(value))
        faults = (text[:-1], text.replace(", ", " ", 1), text.replace(f'"{first}"', first), text[:-1] + ", }",
                  text.replace('"', "'"), text.replace(":", "", 1))  # fmt: skip
        return f"Broken: {draw.choice(faults)}\nRepaired:", text

    return _shown(broken, count, 3, "Repair the JSON.\n\n", tokens=96, right=_same_json)


def _same_json(written: str, answer: str) -> bool:
    try:
        return bool(json.loads(written) == json.loads(answer))
    except (ValueError, RecursionError):
        return False


def _shown(
    make: Callable[[], tuple[str, str]], count: int, shots: int, head: str, *, tokens: int,
    right: Callable[..., bool],
) -> list[Asked]:  # fmt: skip
    done = head + "".join(f"{question} {answer}\n" for question, answer in (make() for _ in range(shots)))
    asked = []
    for _ in range(count):
        question, answer = make()
        asked.append(Asked(done + question, ("\n",), tokens, partial(right, answer=answer)))
    return asked


def code(words: Sequence[str], *, count: int, seed: int = 0) -> list[Asked]:
    """Functions to write; right is what passes the tests, run confined. All of them, whatever the seed."""
    return [Asked(item.prompt, STOPS, 160, partial(_runs, item=item)) for item in ITEMS[:count]]


def _runs(body: str, item: CodeItem) -> bool:
    return passes(item.prompt + body, item.tests)


GENERATED: dict[str, Callable[..., list[Asked]]] = {
    "arithmetic": arithmetic,
    "copying": copying,
    "json": repair,
    "code": code,
}
"""Kinds whose answer is generated, and how their items are drawn."""
