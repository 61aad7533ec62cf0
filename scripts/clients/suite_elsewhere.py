#!/usr/bin/env python
"""Figures of `gqa eval --suite` and `--recall` computed elsewhere, on the same items.

    python scripts/clients/suite_elsewhere.py SMOLLM2 fast --data EN.jsonl \
        --lm-eval-python clients-env/clients/bin/python --out scripts/bench/results/suite_elsewhere.json

Continuations are scored by lm-eval, from the task file that `write_lm_eval_task` writes. Recall is scored by a loop of
its own: transformers' generate writes the answer token by token with a cache, where the suite takes one pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gqa_convert.checkpoint.provenance import versions
from gqa_convert.data.reading import read_documents
from gqa_convert.evaluate.files import write_json
from gqa_convert.evaluate.metrics import RECALL
from gqa_convert.evaluate.recall import make_items, right
from gqa_convert.evaluate.suite.answering import likelihoods
from gqa_convert.evaluate.suite.items import continuations, write_lm_eval_task

TASK = "continuations"


def lm_eval(python: str, folder: str, tasks: str) -> dict[str, Any]:
    """The answer of `lm_eval_choices.py`.

    Raises:
        RuntimeError: with its last words, if it gives none.
    """
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{tasks}/cache"}
    variables.pop("PYTHONPATH", None)
    script = str(Path(__file__).with_name("lm_eval_choices.py"))
    done = subprocess.run([python, script, folder, tasks, TASK], capture_output=True, text=True, env=variables)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWER ")), None)
    if line is None:
        raise RuntimeError(f"lm-eval gave no answer: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
    return answer


def share(values: list[list[float]], choices: list[tuple[str, ...]], answers: list[int], *, by_length: bool) -> float:
    """How many items have the true choice as the likeliest."""
    hits = 0
    for row, texts, answer in zip(values, choices, answers, strict=True):
        scores = [v / len(text) for v, text in zip(row, texts, strict=True)] if by_length else row
        hits += scores.index(max(scores)) == answer
    return hits / len(values)


def continuations_of(folder: str, words: list[str], count: int, python: str) -> dict[str, Any]:
    """Our likelihoods and shares beside lm-eval's."""
    items = continuations(words, count=count)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = [likelihoods(model, tokenizer, item) for item in items]
    with tempfile.TemporaryDirectory() as tasks:
        write_lm_eval_task(items, Path(tasks), TASK)
        theirs = lm_eval(python, folder, tasks)
    choices, answers = [item.choices for item in items], [item.answer for item in items]
    apart = (torch.tensor(ours) - torch.tensor(theirs["likelihoods"])).abs().max()
    return {
        "items": count,
        "lm_eval": theirs["version"],
        "largest_difference_nats": float(apart),
        "acc": {"ours": share(ours, choices, answers, by_length=False), "lm_eval": theirs["results"]["acc,none"]},
        "acc_norm": {
            "ours": share(ours, choices, answers, by_length=True),
            "lm_eval": theirs["results"]["acc_norm,none"],
        },
    }


@torch.inference_mode()
def recall_of(folder: str, text: str, contexts: list[int], count: int) -> dict[str, Any]:
    """Our recall beside that of answers that transformers' generate has written."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = {}
    for context in contexts:
        for kind in RECALL:
            items = make_items(kind, tokenizer, text_ids, context, count=count)
            written = []
            for ids, length in items:
                prompt = torch.tensor([ids[:-length]])
                out = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
                written.append(out[0, -length:].tolist() == ids[-length:])
            ours = right(model, items)
            same = sum(a == b for a, b in zip(ours, written, strict=True))
            found[f"{kind}, {context}"] = {
                "items": count, "ours": sum(ours), "generate": sum(written), "same_items": same,
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--lm-eval-python", required=True, help="Python of an environment that has lm-eval")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--contexts", default="256,512")
    parser.add_argument("--recall-items", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    documents = [document for document in read_documents(args.data) if isinstance(document, str)]
    contexts = [int(context) for context in args.contexts.split(",")]
    results = {}
    for folder in args.models:
        chosen = continuations_of(folder, " ".join(documents).split(), args.items, args.lm_eval_python)
        recalled = recall_of(folder, documents[0], contexts, args.recall_items)
        results[Path(folder).name] = {"continuations": chosen, "recall": recalled}
        print(Path(folder).name, json.dumps(results[Path(folder).name], indent=1), flush=True)
    if args.out is not None:
        write_json(args.out, {"data": Path(args.data).name, "versions": versions(), "models": results})


if __name__ == "__main__":
    main()
