"""Calibration text for a T5: training text with spans cut out of it, as its encoder met it in pretraining.

The decoder's side is the model's own answers, which the package writes. Plain text would not do: a model that has only
ever filled in spans has nothing to say to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gqa_convert.data.encoding import Ids
from gqa_convert.data.spans import SpanCorruption, sentinel_ids

_BLOCKS_OF_A_MODULE = 4
"""At most, so that the calibration sees many modules."""


def corrupted_file(path: Path, model: Path, text: str, *, context: int, count: int) -> Path:
    """Write `count` corrupted blocks of training text, one a line of JSON, each `context` tokens long with its EOS.

    A block is written only if the tokenizer gives the very ids back; windows of calibration text then are blocks.
    """
    from sources import training_modules
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    spans = SpanCorruption.fitting(context, sentinels=sentinel_ids(tokenizer), eos=int(tokenizer.eos_token_id))
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for block in _blocks(tokenizer, training_modules(text), spans):
            if written == count:
                break
            file.write(json.dumps({"text": block}) + "\n")
            written += 1
    return path


def _blocks(tokenizer: Any, modules: list[str], spans: SpanCorruption) -> Iterator[str]:
    """Corrupted blocks as text, without their EOS."""
    rng = np.random.default_rng(0)
    for module in modules:
        ids = np.asarray(tokenizer(module, add_special_tokens=False)["input_ids"], np.int64)
        for start in range(0, len(ids) - spans.raw_length + 1, spans.raw_length)[:_BLOCKS_OF_A_MODULE]:
            inputs: Ids = spans.corrupt(ids[start : start + spans.raw_length], rng)[0][:-1]
            block = tokenizer.decode(inputs, clean_up_tokenization_spaces=False)
            if tokenizer(block)["input_ids"] == inputs.tolist():
                yield block
