"""What models write: the same beginnings of held-out text, continued by the original and by each conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqa_convert.evaluate.examples import Example

PROMPT, LONGEST = 48, 48
"""Tokens of a beginning at most, and of what is written."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A beginning of held-out text, and what each model made of it: (name, text), the original first."""

    prompt: str
    texts: tuple[tuple[str, str], ...]


def chosen(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` of the windows, evenly from all over the data."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def prompt_ids(example: Example) -> list[int]:
    """The tokens that a model goes on from: the beginning of a window, or all that an encoder reads."""
    if "input_ids" not in example.inputs:
        return []  # sound
    ids: list[int] = example.inputs["input_ids"].tolist()
    return ids if "decoder_input_ids" in example.inputs else ids[: max(1, min(PROMPT, len(ids) // 2))]


def written(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """What a model writes after each beginning, its likeliest token at every step."""
    import torch

    from gqa_convert.calibrate.heard import transcripts
    from gqa_convert.hf.greedy import greedy_ids

    texts = []
    for example in examples:
        if "input_ids" not in example.inputs:
            sound = {name: x[None] for name, x in example.inputs.items() if name != "decoder_input_ids"}
            texts.append(str(tokenizer.decode(transcripts(model, [sound])[0], skip_special_tokens=True)))
            continue
        prompt = torch.tensor([prompt_ids(example)], device=model.device)
        room = len(example.inputs["input_ids"]) - prompt.shape[1]
        steps = LONGEST if model.config.is_encoder_decoder else min(LONGEST, max(1, room))
        ids = greedy_ids(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, tokens=steps)[0]
        new = ids if model.config.is_encoder_decoder else ids[prompt.shape[1] :]
        texts.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return texts


def side_by_side(
    examples: Sequence[Example], tokenizer: Any, said: Sequence[tuple[str, Sequence[str]]]
) -> tuple[Sample, ...]:
    """Samples from what each model wrote: (name, its texts)."""
    begun = [prompt_ids(example) for example in examples]
    prompts = [str(tokenizer.decode(ids, skip_special_tokens=True)) if ids else "(a recording)" for ids in begun]
    return tuple(
        Sample(prompt=prompt, texts=tuple((name, texts[i]) for name, texts in said)) for i, prompt in enumerate(prompts)
    )


def renamed(samples: Sequence[Sample], names: Sequence[str]) -> tuple[Sample, ...]:
    """The same with other names of models, in the same order."""
    return tuple(
        replace(sample, texts=tuple((name, text) for name, (_, text) in zip(names, sample.texts, strict=True)))
        for sample in samples
    )
