#!/usr/bin/env python3
"""Tokens per second and peak memory of `gqa uptrain` and of transformers' Trainer: same model, tokens, precision.

    python scripts/bench/train_throughput.py MODEL TRAIN.jsonl --out results.json
    python scripts/bench/train_throughput.py MODEL TRAIN.jsonl --device auto --precision bf16 --distil ORIGINAL
    python scripts/bench/train_throughput.py --sizes 13M 135M --vocabularies 32768 131072 --out results.json

Each side runs in a process of its own, in turn, several times over (what else the machine does hits both alike); the
first steps are left out of the time. On a CPU that other programs use too, compare tokens per second of processor time
(`cpu_time_ratio`), which their load touches least. Both train on documents joined and cut every `context` tokens, with
fused AdamW.
With --distil, a run with distillation from that model is timed as well (`distilled_over_plain`: processor time per
token beside that of cross-entropy). MFU is given where the device's peak is known. With --sizes, random models of
these sizes and vocabularies are made, with a word for each token and text of such words, and each is timed with a
teacher of as many KV heads as query heads.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any


def peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(options: argparse.Namespace, work: Path, distil: str | None) -> dict[str, float]:
    from gqa_convert.uptrain import loop
    from gqa_convert.uptrain.read_config import parse_config

    marks: list[tuple[float, float]] = []
    patched: Any = loop
    real = patched.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        marks.append((time.perf_counter(), time.process_time()))
        return result

    patched.train_step = train_step
    settings = {
        "model": options.model,
        "output": str(work / "run"),
        "budget": {"steps": options.steps},
        "data": {
            "source": {"kind": "jsonl", "paths": [options.train]},
            "context": options.context,
            "separate_documents": False,
            "held_out_fraction": 0.05,
        },
        "objective": {"distillation": {"teacher": distil} if distil else None},
        "schedule": {"kind": "constant", "peak": 1e-4},
        "train": {
            "batch_sequences": options.batch * options.accumulation,
            "micro_batch": options.batch,
            "precision": {"bf16": "bf16", "float32": "float32"}[options.precision],
            "device": options.device,
        },
        "guards": {"spike_factor": None},
        "checkpoints": {"every_minutes": None},
        "evaluation": {"tokens": 1000},
        "log": {"trackers": [], "every_steps": 10},
    }
    loop.uptrain(parse_config(settings), quiet=True)
    return timed(marks, options)


def theirs(options: argparse.Namespace, work: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    from gqa_convert.data.blocks import StoredBlocks
    from gqa_convert.data.documents import SourceSpec, open_corpus
    from gqa_convert.data.encoding import Encoder
    from gqa_convert.data.store import TokenStore

    encoder = Encoder(AutoTokenizer.from_pretrained(options.model))
    corpus = open_corpus(SourceSpec(kind="jsonl", paths=(options.train,)))
    blocks = StoredBlocks(TokenStore.of(encoder.stream(corpus.all_documents())), options.context, seed=0)

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return int(options.steps * options.batch * options.accumulation)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(blocks.get(index).ids[:-1])
            return {"input_ids": ids, "labels": ids}

    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=options.precision == "bf16",
        use_cpu=options.device == "cpu",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.config.use_cache = False
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    return timed(marks, options)


def timed(marks: list[tuple[float, float]], options: argparse.Namespace) -> dict[str, float]:
    wall, busy = (last - first for first, last in zip(marks[options.warmup - 1], marks[-1], strict=True))
    tokens = (len(marks) - options.warmup) * options.batch * options.accumulation * options.context
    return {
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / busy,
        "peak_bytes": peak_memory(),
    }


SIZES: dict[str, dict[str, Any]] = {
    "13M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 2},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip
"""The second is SmolLM2's, but for the vocabulary."""


def make(work: Path, size: str, vocabulary: int, tokens: int) -> tuple[Path, Path, Path]:
    """A random model, its teacher, and text of so many tokens."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(vocabulary - 3))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    settings = {**SIZES[size], "vocab_size": vocabulary, "max_position_embeddings": 4096}
    folders = work / "model", work / "teacher"
    for number, folder in enumerate(folders):
        torch.manual_seed(number)
        heads = {"num_key_value_heads": settings["num_attention_heads"]} if folder.name == "teacher" else {}
        LlamaForCausalLM(LlamaConfig(**{**settings, **heads})).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    draw = random.Random(0)
    with open(work / "text.jsonl", "w") as file:
        for _ in range(tokens // 500 + 100):
            file.write(json.dumps({"text": " ".join(draw.choices(words[3:], k=500))}) + "\n")
    return *folders, work / "text.jsonl"


def in_process(options: argparse.Namespace, side: str) -> dict[str, float]:
    given = {name: getattr(options, name) for name in ("context", "batch", "accumulation", "steps", "warmup")}
    given |= {"precision": options.precision, "device": options.device}
    given |= {"distil": options.distil} if options.distil else {}
    command = [sys.executable, __file__, str(options.model), str(options.train), "--side", side]
    command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("train", nargs="?")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="make random models of these sizes")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32_768, 131_072], help="with --sizes")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "auto"], default="cpu")
    parser.add_argument("--distil", help="also time distillation from this model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["ours", "theirs", "distilled"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            if options.side == "theirs":
                speed = theirs(options, work)
            else:
                speed = ours(options, work, options.distil if options.side == "distilled" else None)
        print(json.dumps(speed))
        return
    if not options.sizes:
        if options.train is None:
            parser.error("give MODEL and TRAIN.jsonl, or --sizes")
        write(options.out, compared(options))
        return
    tokens = options.steps * options.batch * options.accumulation * options.context
    cases = []
    for size in options.sizes:
        for vocabulary in options.vocabularies:
            with tempfile.TemporaryDirectory() as name:
                model, teacher, text = make(Path(name), size, vocabulary, tokens)
                made = argparse.Namespace(**{**vars(options), "model": model, "distil": str(teacher), "train": text})
                print(f"{size}, {vocabulary:,} tokens", flush=True)
                cases.append({"size": size, "vocabulary": vocabulary, **compared(made)})
            write(options.out, {"cases": cases})  # what is done is kept, however long the rest takes


def write(out: Path | None, described: dict[str, Any]) -> None:
    text = json.dumps(described, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Time all sides in turn."""
    sides = ["ours", "theirs", *(["distilled"] if options.distil else [])]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.repeats):
        for side in sides if number % 2 == 0 else reversed(sides):
            runs[side].append(in_process(options, side))
            print(f"{side}: {runs[side][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    return report(options, runs)


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    import torch

    from gqa_convert.budget.shape import peak_flops, shape_of_folder

    shape = shape_of_folder(Path(options.model))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device == "auto" else "cpu"
    peak = peak_flops(device)
    sides: dict[str, Any] = {}
    for side, measured in runs.items():
        rate = median(run["tokens_per_second"] for run in measured)
        sides[side] = {
            "tokens_per_second": round(rate, 1),
            "tokens_per_cpu_second": round(median(run["tokens_per_cpu_second"] for run in measured), 1),
            "peak_bytes": round(median(run["peak_bytes"] for run in measured)),
            "runs": measured,
        }
        if peak:
            sides[side]["mfu"] = rate * shape.training_flops_per_token(options.context) / peak
    pairs = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
    described: dict[str, Any] = {
        "what": "training throughput against transformers.Trainer",
        "model": {"name": Path(options.model).name, "parameters": shape.parameters},
        "settings": {k: v for k, v in vars(options).items() if type(v) is int} | {"precision": options.precision},
        "device": device,
        "versions": {n: version(n) for n in ("gqa-convert", "torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "sides": sides,
        "speed_ratio": round(median(pairs), 3),
        "cpu_time_ratio": round(sides["ours"]["tokens_per_cpu_second"] / sides["theirs"]["tokens_per_cpu_second"], 3),
        "memory_ratio": round(sides["ours"]["peak_bytes"] / sides["theirs"]["peak_bytes"], 3),
    }
    if "distilled" in sides:
        plain, distilled = (sides[side]["tokens_per_cpu_second"] for side in ("ours", "distilled"))
        described["distilled_over_plain"] = round(plain / distilled, 3)
    return described


if __name__ == "__main__":
    main()
