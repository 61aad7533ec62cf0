#!/usr/bin/env python3
"""Show what converting a T5 keeps and costs: caches, generation by strangers, and divergence from the original.

    python scripts/bench/t5_quality.py T5_FOLDER --groups 3,2,1 --out scripts/bench/results/t5_quality.json

Prompts are docstrings of Python's standard library: some to measure on, others to calibrate on, and all but those
that are measured on to heal on. The original answers
each greedily; every conversion then reads the same prompts and answers, and is compared token by token: KL divergence
of its next-token distribution from the original's, and how often both would choose the same token. For each number of
groups a process that has no gqa_convert loads the folder with `trust_remote_code=True`, generates with and without
cache, with a static cache and with beams, and measures the caches. The figures are written as they come, and an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

# Row -> what is chosen about the merge; `calibrated` rows get the calibration prompts.
ROWS: dict[str, dict[str, Any]] = {
    "mean": {},
    "first": {"method": "first"},
    "random": {"method": "random"},
    "aligned": {"method": "aligned", "calibrated": True},
    "pca: no data": {"method": "pca"},
    "pca": {"method": "pca", "calibrated": True},
    "fast": {"preset": "fast", "calibrated": True},
    "best": {"preset": "best", "calibrated": True},
    "fast, healed": {"preset": "fast", "calibrated": True, "healed": True},
    "best, healed": {"preset": "best", "calibrated": True, "healed": True},
}

STRANGER = """
import json, sys
sys.modules["gqa_convert"] = None
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
model.eval()
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
def text(**choices):
    return model.generate(**inputs, max_new_tokens=16, do_sample=False, **choices).tolist()
def size(cache):
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
greedy = text()
one = tokenizer(prompts[:1], return_tensors="pt")
with torch.no_grad():
    seen = model(**one, decoder_input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=True).past_key_values
sys.stdout.write("\\n" + json.dumps({
    "class": type(model).__name__,
    "clean": not any(info.values()),
    "same_without_cache": text(use_cache=False) == greedy,
    "same_with_static_cache": text(cache_implementation="static") == greedy,
    "same_beams_without_cache": text(num_beams=3) == text(num_beams=3, use_cache=False),
    "self_cache_bytes_of_16_tokens": size(seen.self_attention_cache),
    "cross_cache_bytes_of_prompt": size(seen.cross_attention_cache),
    "prompt_tokens": one["input_ids"].shape[1],
}) + "\\n")
"""


def main() -> None:
    """Run everything and print it."""
    args = parse_arguments()
    texts = list(prompts())
    measured, calibration = texts[0 : 2 * args.prompts : 2], texts[1::2]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        apart = set(measured)
        healing = [text for text in prompts("**/*.py") if text not in apart]
        healing += islice((text for text in prompts("**/*.py", "purelib") if text not in apart), args.installed)
        for name, chosen in (("calibration", calibration), ("healing", healing)):
            (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        answers = original_answers(args.model, measured, args.tokens)
        result: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
        if "strangers" not in result:
            result["identity"] = identity(args.model, answers, work)
            print("as many groups as heads:", result["identity"], flush=True)
            result["strangers"] = strangers(args.model, [answers["heads"], *args.groups], measured[:4], work)
        for row in rows(args, answers, work, result.get("rows", {})):
            result["rows"] = row
            if args.out:
                args.out.write_text(json.dumps(described(args, answers, result), indent=1) + "\n")
    show(result["rows"], args.groups)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--groups", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--prompts", type=int, default=64, help="prompts to measure on")
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--sequences", type=int, default=128, help="times the length: tokens to calibrate on")
    parser.add_argument("--length", type=int, default=128, help="longest document")
    parser.add_argument("--heal-tokens", type=int, default=61_440, help="to heal on, padding included")
    parser.add_argument("--installed", type=int, default=0, help="heal on so many docstrings of installed packages too")
    parser.add_argument("--heal-rate", type=float, help="peak learning rate of healing; by default its own rule")
    parser.add_argument("--rows", type=lambda text: text.split(";"), help=f"of {'; '.join(ROWS)}")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def prompts(pattern: str = "*.py", library: str = "stdlib") -> Iterator[str]:
    """First paragraphs of docstrings, each once, in the order of files: the standard library's, or `purelib`'s."""
    seen: set[str] = set()
    root = Path(sysconfig.get_paths()[library])
    for path in sorted(root.glob(pattern)):
        if {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # kept by the library for its own tests
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 8 <= len(text.split()) <= 60 and text not in seen:
                    seen.add(text)
                    yield text


def load(folder: Path) -> Any:
    """Load a model and its tokenizer as any user of the package does."""
    import transformers

    import gqa_convert  # noqa: F401  (tells the Auto classes about converted models)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def original_answers(folder: Path, texts: list[str], tokens: int) -> dict[str, Any]:
    """The original's greedy answers, and its logits at every token of them."""
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96))
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    read, chosen = written[:, :-1], written[:, 1:]
    answers = {"inputs": {**inputs, "decoder_input_ids": read}, "counted": chosen != model.config.pad_token_id}
    answers["logits"] = logits(model, answers["inputs"])
    answers["heads"] = model.config.num_heads
    return answers


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    """Next-token logits along the answers."""
    import torch

    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def identity(folder: Path, answers: dict[str, Any], work: Path) -> dict[str, Any]:
    """With as many groups as heads nothing changes, not a bit."""
    from gqa_convert import convert

    convert(folder, groups=answers["heads"], out=work / "identity")
    seen = logits(load(work / "identity"), answers["inputs"])
    return {"groups": answers["heads"], "largest_logit_difference": float((seen - answers["logits"]).abs().max())}


def strangers(folder: Path, groups: list[int], texts: list[str], work: Path) -> dict[str, Any]:
    """What a process without gqa_convert finds in conversions by mean."""
    from gqa_convert import convert

    findings = {}
    for count in groups:
        out = work / f"stranger-{count}"
        convert(folder, groups=count, out=out)
        command = [sys.executable, "-c", STRANGER, str(out), json.dumps(texts)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{count} groups: {done.stderr[-1000:]}")
        findings[str(count)] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        print(f"{count} groups without gqa_convert:", findings[str(count)], flush=True)
    return findings


def rows(args: argparse.Namespace, answers: dict[str, Any], work: Path, done: dict[str, Any]) -> Iterator[Any]:
    """Divergence from the original, by row and groups: the table as it grows, from what is done already."""
    table: dict[str, Any] = dict(done)
    yield table
    for name in args.rows or ROWS:
        for groups in args.groups:
            if str(groups) in table.get(name, {}):
                continue
            out = work / f"{name}-{groups}".replace(" ", "_").replace(":", "")
            started = time.perf_counter()
            convert_one(args, name, groups, out, work)
            point = {"seconds": round(time.perf_counter() - started, 1), **divergence(load(out), answers)}
            table.setdefault(name, {})[str(groups)] = point
            print(f"{name:14s} {groups} groups  KL {point['kl']:.3f} nats  {point['agreement']:.1%} same", flush=True)
            yield table


def convert_one(args: argparse.Namespace, name: str, groups: int, out: Path, work: Path) -> None:
    """Convert by one row, and heal it on the original's answers; answers and moments are made once for all."""
    from gqa_convert import convert
    from gqa_convert.conversion.recipe import make_recipe

    chosen = dict(ROWS[name])
    if chosen.pop("calibrated", False):
        chosen |= {"calibrate": str(work / "calibration.jsonl"), "sequences": args.sequences, "length": args.length}
    healed = chosen.pop("healed", False)
    recipe = make_recipe(chosen.pop("preset", None), **chosen)
    start = out.with_name(f"{out.name}-start") if healed else out
    convert(args.model, groups=groups, out=start, recipe=recipe, work=work / "solved")
    if healed:
        from gqa_convert.uptrain.heal import HealOptions, heal

        text = str(work / "healing.jsonl")
        options = HealOptions(
            text=text, answers=True, tokens=args.heal_tokens, context=args.length, rate=args.heal_rate
        )
        heal(start, args.model, out=out, options=options, quiet=True)


def divergence(model: Any, answers: dict[str, Any]) -> dict[str, float]:
    """KL(original || converted) in nats per token and the share of tokens on which both agree."""
    seen, was, counted = logits(model, answers["inputs"]), answers["logits"], answers["counted"]
    p, q = was.log_softmax(-1), seen.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[counted].mean()
    return {"kl": float(kl), "agreement": float((seen.argmax(-1) == was.argmax(-1))[counted].float().mean())}


def show(table: dict[str, Any], groups: list[int]) -> None:
    """Print the table."""
    print("\nKL from the original on its own answers, nats per token (share of tokens that agree)")
    print(f"{'':14s} " + " ".join(f"{g:>9d} groups" for g in groups))
    for name, row in table.items():
        cells = (f"{row[str(g)]['kl']:8.3f} ({row[str(g)]['agreement']:5.1%})" for g in groups)
        print(f"{name:14s} " + " ".join(cells))


def described(args: argparse.Namespace, answers: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The figures with what they were made of; names only, no paths."""
    return {
        "model": args.model.name,
        "prompts": args.prompts,
        "answer_tokens": int(answers["counted"].sum()),
        "calibration": {"sequences": args.sequences, "length": args.length},
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
        **{name: result[name] for name in ("identity", "strangers", "rows")},
    }


if __name__ == "__main__":
    main()
