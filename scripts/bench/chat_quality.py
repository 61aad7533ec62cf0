#!/usr/bin/env python3
"""Print what converting and healing do to a chat model's answers: divergence on the original's own, and samples.

    python scripts/bench/chat_quality.py ORIGINAL --models best=B healed=H --out chat.json

The original answers every question below in its own template (greedily). Every model is then scored on those answers
(KL from the original, share of tokens on which both choose alike, loss increase), and answers the same questions
itself, so that one can read whether it still does.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "Give me three tips for sleeping better.",
    "What is 12 plus 30?",
    "Write a Python function that reverses a string.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Summarise what photosynthesis does, for a child.",
    "Suggest a name for a bakery, and say why.",
    "What should I pack for a day in the mountains?",
    "Write a polite e-mail that asks for a day off.",
)


def named(text: str) -> tuple[str, str]:
    """Split `name=path`."""
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write it as name=path")
    return name, path


def answer(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """The model's own answer, token by token its first choice; without the prompt."""
    import torch

    with torch.no_grad():
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    reply: torch.Tensor = written[0, prompt.shape[1] :]
    return reply


def log_probabilities(model: Any, prompt: torch.Tensor, reply: torch.Tensor) -> torch.Tensor:
    """(answer's tokens, words), float32: what the model expects at each token of an answer."""
    import torch

    with torch.no_grad():
        logits = model(torch.cat([prompt, reply[None]], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    expected: torch.Tensor = logits.float().log_softmax(-1)
    return expected


def main() -> None:
    """Let the original answer, score the others, print and keep everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("--models", type=named, nargs="+", required=True, help="name=folder of each conversion")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--out", type=Path, help="write figures and samples here as JSON")
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(args.original)
    original = AutoModelForCausalLM.from_pretrained(args.original, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]
    replies = [answer(original, prompt, args.tokens) for prompt in prompts]
    wanted = [log_probabilities(original, *pair) for pair in zip(prompts, replies, strict=True)]
    samples: dict[str, list[str]] = {"original": [tokenizer.decode(reply) for reply in replies]}
    figures: dict[str, Any] = {}
    for name, folder in args.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        kl = alike = loss = 0.0
        for prompt, reply, base in zip(prompts, replies, wanted, strict=True):
            seen = log_probabilities(model, prompt, reply)
            kl += float((base.exp() * (base - seen)).sum())
            alike += float((base.argmax(-1) == seen.argmax(-1)).sum())
            loss += float((base - seen).gather(-1, reply[:, None]).sum())
        tokens = sum(len(reply) for reply in replies)
        own = [answer(model, prompt, args.tokens) for prompt in prompts]
        samples[name] = [tokenizer.decode(reply) for reply in own]
        ended = sum(int(reply[-1]) == tokenizer.eos_token_id for reply in own)
        figures[name] = {"kl": kl / tokens, "top1": alike / tokens, "increase": loss / tokens, "ended": ended}
        print(f"{name}: KL {kl / tokens:.3f}, same choice {alike / tokens:.1%}, loss {loss / tokens:+.3f}, ", end="")
        print(f"{ended} of {len(own)} answers ended by themselves", flush=True)
    ended = sum(int(reply[-1]) == tokenizer.eos_token_id for reply in replies)
    for number, question in enumerate(QUESTIONS):
        print(f"\n## {question}")
        for name, written in samples.items():
            print(f"[{name}] {written[number]!r}")
    if args.out:
        told = {
            "what": "a chat model's answers before and after conversion",
            "command": "python scripts/bench/chat_quality.py ORIGINAL --models ...",
            "answer_tokens": sum(len(reply) for reply in replies),
            "original_ended": ended,
            "models": figures,
            "questions": QUESTIONS,
            "samples": samples,
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        args.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
