"""What a model writes, greedily, and how likely it finds a continuation, as lm-evaluation-harness counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gqa_convert.evaluate.results import SuiteResult
from gqa_convert.evaluate.suite.items import Choice
from gqa_convert.hf.greedy import greedy_ids

KEPT = 300
"""Characters of each answer that results keep."""


def likelihoods(model: Any, tokenizer: Any, item: Choice) -> list[float]:
    """Log-likelihood of every choice behind the context, in nats.

    Text is made tokens as lm-eval's HFLM does it: the whole first, the context by itself, and the rest of the whole is
    the continuation.
    """
    return [_likelihood(model, tokenizer, item.context, choice) for choice in item.choices]


@torch.inference_mode()
def _likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    whole = list(tokenizer(context + continuation)["input_ids"])
    length = len(list(tokenizer(context)["input_ids"]))
    ids = torch.tensor([whole], device=next(model.parameters()).device)
    logp_TV = model(input_ids=ids[:, :-1], use_cache=False).logits[0, length - 1 :].float().log_softmax(-1)
    return float(logp_TV.gather(-1, ids[0, length:, None]).sum())


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, tokens: int, stops: Sequence[str] = (), batch: int
) -> list[list[int]]:
    """What a model writes behind prompts of token ids, until its end token, a stop or so many tokens.

    Without stops its end token ends nothing. Prompts of one length go together, so that none is padded.
    """
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    written: list[list[int]] = [[] for _ in prompts]
    for length, numbers in by_length.items():
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            ids = torch.tensor([list(prompts[i]) for i in part], device=next(model.parameters()).device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            enough = [_Stops(tokenizer, length, stops)] if stops else []
            output = greedy_ids(model, inputs, tokens=tokens, ends=bool(stops), stopping=enough)
            for i, row in zip(part, output[:, length:].tolist(), strict=True):
                written[i] = row
    return written


class _Stops:
    """Done is a row whose new text holds one of the stops."""

    def __init__(self, tokenizer: Any, length: int, stops: Sequence[str]) -> None:
        self._tokenizer, self._length, self._stops = tokenizer, length, tuple(stops)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._length :], skip_special_tokens=True)
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def until(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops."""
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=len(text))]


def result_of(
    model: str, kind: str, scores: Sequence[float], written: Sequence[str] = (), sizes: Sequence[int] = ()
) -> SuiteResult:
    """What a model scored, with the beginning of each answer."""
    return SuiteResult(
        model=model,
        kind=kind,
        scores=tuple(map(float, scores)),
        written=tuple(text[:KEPT] for text in written),
        sizes=tuple(sizes),
    )


def agreed(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
