#!/usr/bin/env python3
"""Collect a mixture of text to heal a model on, out of what lies on a Debian machine and what the model writes itself.

    python scripts/bench/healing_texts.py MODEL --texts CALIBRATION.jsonl --out FOLDER [--own 55k]

FOLDER gets a .jsonl file for each kind, about so many tokens of each: `en` and `py`, prose and Python out of the files
of `--texts`; `languages`, manual pages in seven languages (French is left out, to be measured on); `manuals`, English
ones; `code`, headers, Perl, shell, Tcl, SQL and the like. `copies` are passages of all of those that come back after
something else, and lists whose lines come back in another order: what a model can only predict by looking back, which
is what it loses first with its heads. `own` is what the model wrote: answers to questions of this
script in its chat template (stories, scenes of plays, JavaScript, everyday questions), and plain beginnings carried on.
It goes on where it stopped: a file that is there is not made again, and `own` is added to until it is long enough.
`gqa heal --text FOLDER` takes it as it is.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gqa_convert.budget.counts import parse_count

SHARES = {"en": 142_000, "py": 205_000, "languages": 45_000, "manuals": 25_000, "code": 40_000, "copies": 100_000}
LANGUAGES = ("de", "es", "it", "nl", "pl", "pt", "sv")
CODE = (
    "/usr/include/**/*.h", "/usr/share/perl/**/*.pm", "/usr/share/bash-completion/**/*", "/usr/share/doc/**/*.sh",
    "/usr/lib/git-core/git-*", "/usr/share/tcltk/**/*.tcl", "/usr/lib/x86_64-linux-gnu/perl/**/*.pm",
    "/usr/share/**/*.sql",
)  # fmt: skip
PIECE = 6000
"""Characters of the longest document."""
BATCH, ANSWER = 32, 288
COPIED = 1500
"""Characters of the longest document of passages that come back."""


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help=".jsonl files of prose and Python")
    parser.add_argument("--own", default="55k", help="tokens that the model writes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    draw = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    given = [json.loads(line)["text"] for file in args.texts for line in file.read_text().splitlines()]
    sources: dict[str, Callable[[], Iterable[str]]] = {
        "en": lambda: pieces(text for text in given if not is_python(text)),
        "py": lambda: pieces(text for text in given if is_python(text)),
        "languages": lambda: manual_pages(LANGUAGES, draw),
        "manuals": lambda: manual_pages(("man1", "man5", "man7", "man8"), draw),
        "code": lambda: code(draw),
        "copies": lambda: copied(args.out, args.seed),
    }  # fmt: skip
    for kind, documents in sources.items():
        path = args.out / f"{kind}.jsonl"
        if not path.exists():
            print(f"{kind}: {take(path, list(documents()), SHARES[kind], tokenizer, draw):,} tokens", flush=True)
    write_own(args.model, tokenizer, args.out / "own.jsonl", parse_count(args.own), args.seed)


def is_python(text: str) -> bool:
    """Whether enough lines begin as Python's do."""
    return len(re.findall(r"(?m)^\s*(?:def |import |from \S+ import|class |return\b|if .*:$)", text)) > 5


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut to the length of a document."""
    return (text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE))


def manual_pages(folders: Iterable[str], draw: random.Random, count: int = 20) -> Iterator[str]:
    """Some manual pages of each folder as they are read, without overprinting."""
    environment = {"PATH": "/usr/bin:/bin", "MANWIDTH": "90", "LC_ALL": "C.UTF-8"}
    for folder in folders:
        files = sorted(file for file in Path("/usr/share/man", folder).rglob("*.gz") if file.stat().st_size > 1500)
        for file in draw.sample(files, min(count, len(files))):
            shown = subprocess.run(["man", "-P", "cat", "-l", str(file)], capture_output=True, env=environment)
            yield re.sub(r".\x08", "", shown.stdout.decode(errors="ignore"))[:4000]


def code(draw: random.Random, count: int = 12) -> Iterator[str]:
    """The beginnings of some source files of each kind."""
    for pattern in CODE:
        files = sorted(file for file in Path("/").glob(pattern[1:]) if file.is_file())
        files = [file for file in files if 1500 < file.stat().st_size < 200_000]
        for file in draw.sample(files, min(count, len(files))):
            content = file.read_bytes()
            if b"\0" not in content[:2000]:
                yield content.decode(errors="ignore")[:3500]


def copied(folder: Path, seed: int, count: int = 400) -> Iterator[str]:
    """Passages of the other kinds that come back, and lists whose lines do, as `gqa heal --copies` makes them."""
    from gqa_convert.data.copies import copies

    files = [folder / f"{kind}.jsonl" for kind in SHARES if kind != "copies"]
    texts = [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return islice(copies(texts, length=COPIED, seed=seed), count)


def take(path: Path, documents: list[str], wanted: int, tokenizer: Any, draw: random.Random) -> int:
    """Write documents in a random order until there are so many tokens; returns how many there are."""
    draw.shuffle(documents)
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in documents:
            if written >= wanted:
                break
            if len(text.strip()) < 400:
                continue
            written += len(tokenizer(text, add_special_tokens=False).input_ids) + 1
            file.write(json.dumps({"text": text.strip()}, ensure_ascii=False) + "\n")
    return written


NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "Daniel",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ivy",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olivia",
    "Peter",
    "Rosa",
    "Sam",
    "Tom",
    "Zoe",
]
ANIMALS = ["dog", "cat", "rabbit", "bear", "bird", "fox", "frog", "mouse", "elephant", "turtle"]
PLACES = ["garden", "forest", "park", "beach", "kitchen", "farm", "school", "mountain", "river", "village"]
THINGS = ["ball", "kite", "cake", "boat", "book", "lamp", "hat", "box", "flower", "drum"]
PERSONS = ["king", "queen", "duke", "soldier", "merchant", "servant", "lord", "nurse", "sailor", "judge"]
MOODS = ["love", "anger", "grief", "jealousy", "ambition", "betrayal", "hope", "fear", "honour", "revenge"]
SUBJECTS = [
    "water",
    "music",
    "history",
    "football",
    "cooking",
    "trees",
    "computers",
    "bread",
    "cities",
    "birds",
    "money",
    "winter",
    "maps",
    "health",
]
PARTS = (
    "an array of numbers", "a shopping cart", "a DOM element", "a promise", "a date picker", "a linked list",
    "a form validator", "an event emitter", "a binary tree", "a timer", "a cookie store", "an HTTP client",
    "a text parser", "a colour converter", "a cache", "a queue", "a search index", "a router", "a test runner",
)  # fmt: skip


def asked(kind: str, draw: random.Random) -> str:
    """A question of that kind."""
    name, animal, place, thing = (draw.choice(words) for words in (NAMES, ANIMALS, PLACES, THINGS))
    subject, other = draw.choice(SUBJECTS), draw.choice(PERSONS)
    if kind == "story":
        return f"Write a short, simple story for small children about {name}, a {animal} and a {thing} in the {place}."
    if kind == "play":
        return (
            f"Write a scene of a play in the style of the sixteenth century, in verse, in which a "
            f"{draw.choice(PERSONS)} and a {other} speak of {draw.choice(MOODS)}."
        )
    if kind == "js":
        return f"Write a JavaScript module with several functions for {draw.choice(PARTS)}. Only code."
    return draw.choice(
        [
            f"What is the most important thing to know about {subject}?",
            f"Explain {subject} to a child.",
            f"Give me five facts about {subject}.",
            f"How much is {draw.randint(2, 90)} plus {draw.randint(2, 90)}?",
            f"Write an email to {name} about {subject}.",
            f"Write a poem about the {animal}.",
            f"List three uses of a {thing}.",
        ]
    )


def begun(kind: str, draw: random.Random) -> str:
    """The beginning of a text of that kind."""
    if kind == "story":
        return f"Once upon a time, there was a little {draw.choice(ANIMALS)} named {draw.choice(NAMES)}. One day,"
    if kind == "play":
        return f"ACT {draw.choice(('I', 'II', 'III'))}. SCENE I.\n\n{draw.choice(PERSONS).upper()}:\n"
    return draw.choice(
        ("'use strict';\n\n", "/**\n * ", "function ", "const ", "module.exports = {\n", "export class ")
    )


ROUND = (
    ("story", True),
    ("js", False),
    ("chat", True),
    ("play", True),
    ("story", False),
    ("js", True),
    ("play", False),
)
"""Kinds in turn, and whether they are asked for in the chat template."""


def write_own(model_folder: str, tokenizer: Any, path: Path, wanted: int, seed: int) -> None:
    """Let the model write until the file holds so many tokens, a batch of one kind at a time."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    total = sum(row["tokens"] for row in rows)
    if total >= wanted:
        return
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    tokenizer.padding_side = "left"
    number = len(rows) // BATCH
    while total < wanted:
        kind, templated = ROUND[number % len(ROUND)]
        number += 1
        torch.manual_seed(seed + number)
        draw = random.Random(seed + number)
        texts = [asked(kind, draw) if templated else begun(kind, draw) for _ in range(BATCH)]
        if templated:
            turns = [[{"role": "user", "content": text}] for text in texts]
            texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        started = time.monotonic()
        with torch.inference_mode():
            written = model.generate(
                **batch, max_new_tokens=ANSWER, do_sample=True, temperature=0.9 if templated else 1.0, top_p=0.95,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        with open(path, "a", encoding="utf-8") as file:
            for start, ids in zip(texts, written[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
                text = start + tokenizer.decode(ids[: end if templated else end - 1 if end < len(ids) else end])
                count = len(tokenizer(text, add_special_tokens=False).input_ids)
                file.write(json.dumps({"text": text, "tokens": count}, ensure_ascii=False) + "\n")
                total += count
        print(f"own: {total:,} tokens, the last ones ({kind}) in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
