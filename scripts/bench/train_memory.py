#!/usr/bin/env python3
"""Holds the count of `gqa uptrain --dry-run` to measured runs: peak memory of real steps, by size and objective.

    python scripts/bench/train_memory.py [--out results.json] [--quick]

Each run is a process of its own, and its peak is all that it holds: Python, torch, libraries, model, steps. Two cases
are whole runs of the product, with its data, evaluations and checkpoints. Exits with 1 if a count is more than 20 %
off.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqa_convert.budget.memory import TrainingMemory

SIZES: dict[str, dict[str, Any]] = {
    "13M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 16384},
    "60M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 32768},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("13M", {"context": 512, "micro": 8}),
    ("13M", {"context": 512, "micro": 8, "distil": True}),
    ("13M", {"context": 512, "micro": 8, "whole": True}),
    ("13M", {"context": 512, "micro": 8, "distil": True, "accumulation": 2, "whole": True}),
    ("60M", {"context": 512, "micro": 4}),
    ("60M", {"context": 512, "micro": 2, "accumulation": 2}),
    ("60M", {"context": 512, "micro": 4, "checkpointing": True}),
    ("60M", {"context": 512, "micro": 2, "parameters": "attention", "distil": True}),
    ("135M", {"context": 512, "micro": 2}),
]
TOLERANCE = 0.2


def measure(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Peak of two steps in this process, and the count."""
    import ctypes

    import torch

    from gqa_convert.budget.memory import training_memory
    from gqa_convert.budget.shape import shape_of_folder
    from gqa_convert.hf.loading import Source, load_model
    from gqa_convert.uptrain import optim, parameters
    from gqa_convert.uptrain.build import loss_spec
    from gqa_convert.uptrain.forecast import training_setup
    from gqa_convert.uptrain.loop import uptrain
    from gqa_convert.uptrain.model import ScoredModel, Teacher
    from gqa_convert.uptrain.plan import resolve
    from gqa_convert.uptrain.read_config import parse_config

    text = folder / "text.txt"
    text.write_text("words\n" * 20_000)
    accumulation = case.get("accumulation", 1)
    objective = {"distillation": {"teacher": str(folder), "dtype": "float32"}} if case.get("distil") else {}
    plan = resolve(
        parse_config(
            {
                "model": str(folder),
                "output": tempfile.mkdtemp(dir=folder.parent),
                "budget": {"steps": 2},
                "data": {
                    "source": {"kind": "text", "paths": [str(text)], "documents": "line"},
                    "context": case["context"],
                    "held_out_fraction": 0.0,
                    "held_out_source": {"kind": "text", "paths": [str(text)], "documents": "line"},
                },
                "objective": objective,
                "schedule": {"peak": 1e-4},
                "train": {
                    "batch_sequences": case["micro"] * accumulation,
                    "micro_batch": case["micro"],
                    "precision": "float32",
                    "parameters": case.get("parameters", "all"),
                    "gradient_checkpointing": case.get("checkpointing", False),
                },
                "evaluation": {"tokens": 2 * case["context"]},
                "log": {"trackers": []},
            }
        )
    )
    config = plan.config
    taught = shape_of_folder(folder) if case.get("distil") else None
    if case.get("whole"):
        uptrain(config, quiet=True)
        return compared(training_memory(plan.shape, training_setup(config), taught))
    source = Source.open(folder)
    model = parameters.choose_parameters(load_model(source, dtype=torch.float32), config.train)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = Teacher(load_model(source, dtype=torch.float32), layers=False) if case.get("distil") else None
    scored = ScoredModel(model, loss_spec(plan)).train()
    optimizer = optim.make_optimizer(scored, config.optimizer)
    # glibc keeps what was freed; here it is to give everything back that it can.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for _ in range(2):
        for _ in range(accumulation):
            ids = torch.randint(3, 1000, (case["micro"], case["context"]))
            inputs = {"input_ids": ids}
            loss, _ = scored(inputs, ids.roll(-1, 1), teacher(inputs) if teacher else None)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return compared(training_memory(plan.shape, training_setup(config, trained=trained), taught))


def compared(counted: TrainingMemory) -> dict[str, Any]:
    """The most that this process has held, beside the count."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"measured": peak, "counted": counted.to_json(), "ratio": counted.peak / peak}


def make(folder: Path, size: str) -> None:
    """A random model of that size."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES[size], max_position_embeddings=2048)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"words": 0, "</s>": 1}, unk_token="words"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)


def main() -> int:
    """Run every case and say how far off the counts are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="the smallest size alone")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), json.loads(options.one[1]))))
        return 0
    import torch
    import transformers

    measured = []
    with tempfile.TemporaryDirectory() as work:
        for size, case in [case for case in CASES if case[0] == "13M" or not options.quick]:
            folder = Path(work) / size
            if not folder.exists():
                make(folder, size)
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(folder), json.dumps(case)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                return 1
            result = {"size": size, **case, **json.loads(done.stdout)}
            measured.append(result)
            print(
                f"{size} {case}: measured {result['measured'] / 1e6:,.0f} MB, counted "
                f"{result['counted']['peak'] / 1e6:,.0f} MB, {result['ratio']:.2f}",
                flush=True,
            )
    if options.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        told = {"machine": platform.processor() or platform.machine(), "versions": versions, "cases": measured}
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(any(abs(result["ratio"] - 1) > TOLERANCE for result in measured))


if __name__ == "__main__":
    sys.exit(main())
