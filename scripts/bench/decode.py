#!/usr/bin/env python
"""Decode benchmark of a Llama-shaped model of random weights, with fewer and fewer KV heads.

One command redoes every figure and writes them as JSON:

    python scripts/bench/decode.py --out scripts/bench/results/decode-cpu.json
    python scripts/bench/decode.py --device cuda --dtype bfloat16 --layers 32 --width 4096 --heads 32 \
        --groups 32,8,4,1 --batch 1,16,64 --context 2k,8k,32k --cache static --mode compile \
        --out scripts/bench/results/decode-cuda.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from gqa_convert.evaluate.decode.bench import bench
from gqa_convert.evaluate.decode.contender import Contender
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.files import write_json
from gqa_convert.evaluate.models import DTYPES, pick_device
from gqa_convert.evaluate.show_bench import point_line, show_bench
from gqa_convert.evaluate.sizes import parse_bytes, parse_counts


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the defaults are those of the committed CPU figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--groups", default="16,8,4,2,1", help="KV heads, the base first")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--context", default="512,2k,8k")
    parser.add_argument("--cache", default="dynamic,static")
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--memory", default="16GiB", help="say how many sequences fit in this much")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads [default: torch's own choice]")
    return parser.parse_args()


def contender(args: argparse.Namespace, kv_heads: int) -> Contender:
    """Build a random model with the proportions of Llama 2."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(parse_counts(args.context, "--context")) + args.steps + 1,
    )
    torch.manual_seed(0)
    with torch.device(pick_device(args.device)):
        model = LlamaForCausalLM._from_config(config, dtype=DTYPES[args.dtype]).eval()
    return Contender(name=f"{kv_heads} KV heads", query_heads=args.heads, kv_heads=kv_heads, model=model)


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = BenchSettings(
        batches=parse_counts(args.batch, "--batch"),
        contexts=parse_counts(args.context, "--context"),
        caches=tuple(args.cache.split(",")),
        mode=args.mode,
        steps=args.steps,
        rounds=args.rounds,
        prefill_tokens=args.prefill_tokens,
        memory=parse_bytes(args.memory, "--memory"),
    )
    err = Console(stderr=True)
    contenders = [contender(args, groups) for groups in parse_counts(args.groups, "--groups")]
    found = bench(contenders, settings, on_point=lambda point: err.print(point_line(point), highlight=False))
    show_bench(found)
    if args.out is not None:
        shape = {"layers": args.layers, "width": args.width, "heads": args.heads, "vocab": args.vocab}
        write_json(args.out, found.to_json() | {"model": shape})


if __name__ == "__main__":
    main()
