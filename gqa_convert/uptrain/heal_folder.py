"""The folder of a healing run: its settings, the text that the original wrote, and what an interrupted run left."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.writer import write_text
from gqa_convert.conversion.recipe import SELF
from gqa_convert.errors import OutputError, UsageError
from gqa_convert.uptrain.heal_settings import (
    ANSWERED_TOKENS,
    CONTEXT,
    COPIES,
    HELD_OUT,
    MOST_COPIED,
    OWN_ANSWERS,
    OWN_TEXT,
    OWN_TOKENS,
    HealOptions,
    heal_settings,
    sequence_length,
    weighted_texts,
)

if TYPE_CHECKING:
    from gqa_convert.uptrain.config import UptrainConfig

Tell = Callable[[str], None]

_SETTINGS = "heal.json"
_RUN = "uptrain.json"
_ANSWERED_AT_ONCE = 64
_SHORT_ANSWER = 16  # tokens; to a longer text an answer may be as long as the text


@contextmanager
def heal_folder(target: Path, work: str | Path | None) -> Iterator[Path]:
    """Yield the folder of the run: the user's, kept, or one beside the target that is removed when all went well."""
    folder = target.absolute().with_name(f".{target.name}.heal") if work is None else Path(work).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    yield folder
    if work is None and is_main():
        shutil.rmtree(folder, ignore_errors=True)


def is_main() -> bool:
    """Whether this is the first process of a launcher's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def settled(
    options: HealOptions,
    source: Path,
    teacher: Path,
    folder: Path,
    *,
    trust_remote_code: bool = False,
    tell: Tell | None = None,
) -> UptrainConfig:
    """The uptraining that these options come to; an interrupted run's own, if `folder` holds one.

    Raises:
        UsageError: if `folder` holds a run with other options or models.
    """
    from gqa_convert.uptrain.read_config import load_config, parse_config

    say = tell or (lambda _: None)
    given = {"options": asdict(options), "converted": str(source.resolve()), "original": str(teacher.resolve())}
    wanted = json.loads(json.dumps(given))
    kept = folder / _SETTINGS
    while not is_main() and not kept.is_file():
        time.sleep(1.0)  # the first process writes it, perhaps after the original has written its text
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        changed = [name for name, value in wanted.items() if before.get(name) != value]
        if changed:
            raise UsageError(
                f"{folder}: holds an interrupted healing with other {' and '.join(changed)}. Give the same ones, "
                "another --work, or remove the folder."
            )
        return load_config(folder / _RUN)
    if SELF in [name for name, _ in weighted_texts(options.text)] and is_main():
        write_own_text(options, teacher, folder / OWN_TEXT, trust_remote_code=trust_remote_code, tell=say)
    if options.answers and is_main():
        write_own_answers(options, teacher, folder / OWN_ANSWERS, trust_remote_code=trust_remote_code, tell=say)
    if options.copies and is_main():
        write_copies(options, teacher, folder, trust_remote_code=trust_remote_code)
    values = heal_settings(options, source, teacher, folder, trust_remote_code=trust_remote_code)
    config = parse_config(values, where="heal")
    if is_main():
        _write_whole(folder / _RUN, json.dumps(values, indent=1) + "\n")
        _write_whole(kept, json.dumps(wanted, indent=1) + "\n")
    return config


def write_own_text(options: HealOptions, teacher: Path, path: Path, *, trust_remote_code: bool, tell: Tell) -> None:
    """Let the original write the text, as many tokens as are trained on but at most `OWN_TOKENS`, one window a line.

    Raises:
        UnsupportedModelError: for an encoder-decoder, which answers and does not begin.
        CheckpointError: if its tokenizer cannot be loaded.
    """
    if path.is_file():
        return
    from gqa_convert.calibrate.self_text import self_tokens
    from gqa_convert.hf.loading import Source

    source = Source.open(teacher, trust_remote_code=trust_remote_code)
    length = sequence_length(options, source.config)
    count = max(64, min(options.tokens, OWN_TOKENS) // length)
    tell(f"the original writes {count * length:,} tokens to be healed on")
    ids_NT = self_tokens(source, sequences=count, length=length, piece=length, seed=options.seed)
    tokenizer = source.tokenizer()
    texts = tokenizer.batch_decode(ids_NT[:, 1:])
    _write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_own_answers(options: HealOptions, teacher: Path, path: Path, *, trust_remote_code: bool, tell: Tell) -> None:
    """Let an encoder-decoder answer the text, `ANSWERED_TOKENS` tokens of it at most, one text and its answer a line.

    It answers as it is used: each document whole, or its beginning, by its likeliest tokens.

    Raises:
        UsageError: if there is no such text, or it holds conversations.
        CheckpointError: if its tokenizer cannot be loaded.
    """
    if path.is_file():
        return
    from gqa_convert.hf.greedy import greedy_ids
    from gqa_convert.hf.loading import Source, load_model

    source = Source.open(teacher, trust_remote_code=trust_remote_code)
    tokenizer = source.tokenizer()
    texts = _texts_to_answer(options, tokenizer)
    tell(f"the original answers {len(texts):,} texts of {sum(len(ids) for _, ids in texts):,} tokens")
    model, lines = load_model(source), []
    texts.sort(key=lambda pair: len(pair[1]))  # such as are alike in length go together
    for start in range(0, len(texts), _ANSWERED_AT_ONCE):
        said = [text for text, _ in texts[start : start + _ANSWERED_AT_ONCE]]
        longest = max(_SHORT_ANSWER, len(texts[start + len(said) - 1][1]))
        inputs = dict(tokenizer(said, return_tensors="pt", padding=True))
        written = greedy_ids(model, inputs, tokens=longest)
        answered = tokenizer.batch_decode(written, skip_special_tokens=True)
        lines += [json.dumps({"input": a, "target": b}) for a, b in zip(said, answered, strict=True) if b]
    _write_whole(path, "".join(f"{line}\n" for line in lines))


def _texts_to_answer(options: HealOptions, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Documents with their tokens, at most half a sequence of each and so many tokens in all as may be answered."""
    from gqa_convert.data.conversations import Conversation
    from gqa_convert.data.sampling import documents
    from gqa_convert.hf import api

    length = (options.context or CONTEXT) // 2
    left, texts = min(options.tokens, ANSWERED_TOKENS), []
    for text in documents(str(options.text), seed=options.seed):
        if isinstance(text, Conversation):
            raise UsageError(
                f"{options.text}: holds conversations, and an encoder-decoder reads single texts. Give it text."
            )
        with api.quiet():
            ids: list[int] = tokenizer(text, truncation=True, max_length=length)["input_ids"]
            whole = len(ids) < length or len(tokenizer(text)["input_ids"]) == length
        said = text if whole else tokenizer.decode(ids, skip_special_tokens=True)
        if said.strip():
            texts.append((said, ids))
            left -= len(ids)
        if left <= 0:
            break
    if not texts:
        raise UsageError(f"{options.text}: holds no text to answer. Name another.")
    return texts


def write_copies(options: HealOptions, teacher: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """Make passages of the text come back, as many tokens as their share of the run.

    What the run holds out of the text is left out.

    Raises:
        UsageError: if the text is conversations alone.
        CheckpointError: if the original's tokenizer cannot be loaded.
    """
    path = folder / COPIES
    if path.is_file():
        return
    from gqa_convert.data.conversations import Conversation
    from gqa_convert.data.copies import copies
    from gqa_convert.data.sampling import documents
    from gqa_convert.data.split import is_held_out
    from gqa_convert.hf.loading import Source

    texts: list[str] = []
    for name, _ in weighted_texts(options.text):
        read = documents(str(folder / OWN_TEXT) if name == SELF else name, seed=options.seed)
        plain = (text for text in read if text and not isinstance(text, Conversation))
        texts += islice((text for text in plain if not is_held_out(text, HELD_OUT)), MOST_COPIED)
    if not texts:
        raise UsageError("heal: copies: the text is conversations alone. Name plain text too, or leave it out.")
    source = Source.open(teacher, trust_remote_code=trust_remote_code)
    sample = "\n".join(text[:2000] for text in texts[:100])
    each = len(sample) / max(1, len(source.tokenizer()(sample, add_special_tokens=False)["input_ids"]))
    left, lines = each * options.copies * options.tokens, []
    for document in copies(
        texts, length=max(24, int(0.9 * sequence_length(options, source.config) * each)), seed=options.seed
    ):
        lines.append(json.dumps({"text": document}) + "\n")
        left -= len(document)
        if left <= 0:
            break
    _write_whole(path, "".join(lines))


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is whole under its name or not there."""
    beside = path.with_name(f"{path.name}.part")
    try:
        write_text(beside, text)
        beside.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder}: cannot be written to ({error.strerror or error}). Choose another --work.")
