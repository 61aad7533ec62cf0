#!/usr/bin/env python
"""Decode benchmark of a Llama- or T5-shaped model of random weights, with fewer and fewer KV heads.

One command redoes every figure and writes them as JSON:

    python scripts/bench/decode.py --out scripts/bench/results/decode-cpu.json
    python scripts/bench/decode.py --device cuda --dtype bfloat16 --layers 32 --width 4096 --heads 32 \
        --groups 32,8,4,1 --batch 1,16,64 --context 2k,8k,32k --cache static --mode compile \
        --out scripts/bench/results/decode-cuda.json
    python scripts/bench/decode.py --shape t5 --groups 16,4,1 --batch 1,4 --context 512,2k --steps 2 --rounds 5 \
        --out scripts/bench/results/decode-t5-cpu.json

The T5 has the proportions of T5.1.1; with fewer KV heads it is the class that goes along with a converted T5.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from gqa_convert.budget.counts import parse_bytes, parse_counts, parse_single
from gqa_convert.checkpoint.dtypes import FLOAT_NAMES
from gqa_convert.cli.show_bench import point_line, show_bench
from gqa_convert.evaluate.decode.bench import bench
from gqa_convert.evaluate.decode.contender import Contender
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.files import write_json
from gqa_convert.hf.loading import pick_device, pick_dtype
from gqa_convert.modeling import shipping


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the defaults are those of the committed CPU figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--shape", default="llama", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--groups", default="16,8,4,2,1", help="KV heads, the base first")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--context", default="512,2k,8k")
    parser.add_argument("--source-tokens", help="tokens that the T5's encoder has read [default: as the context]")
    parser.add_argument("--cache", default="dynamic,static")
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--memory", default="16GiB", help="say how many sequences fit in this much")
    parser.add_argument("--dtype", default="bfloat16", choices=FLOAT_NAMES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads [default: torch's own choice]")
    return parser.parse_args()


def llama(args: argparse.Namespace, kv_heads: int) -> tuple[Any, Any]:
    """The class and configuration of a model with the proportions of Llama 2."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(parse_counts(args.context, "--context")) + args.steps + 1,
    )
    return LlamaForCausalLM, config


def t5(args: argparse.Namespace, kv_heads: int) -> tuple[Any, Any]:
    """The class and configuration of a model with the proportions of T5.1.1: stock, or as converted."""
    settings: dict[str, Any] = {"tie_word_embeddings": False}
    config = T5Config(
        vocab_size=args.vocab,
        d_model=args.width,
        d_kv=args.width // args.heads,
        d_ff=args.width * 11 // 4,
        num_layers=args.layers,
        num_heads=args.heads,
        feed_forward_proj="gated-gelu",
        **settings,
    )
    if kv_heads == args.heads:
        return T5ForConditionalGeneration, config
    return shipping.grouped_class(T5ForConditionalGeneration), shipping.grouped_config(config, kv_heads)


SHAPES = {"llama": llama, "t5": t5}


def contender(args: argparse.Namespace, kv_heads: int) -> Contender:
    """Build a random model."""
    cls, config = SHAPES[args.shape](args, kv_heads)
    torch.manual_seed(0)
    device = pick_device(args.device)
    with torch.device(device):
        model = cls._from_config(config, dtype=pick_dtype(args.dtype, device)).eval()
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
        source_tokens=parse_single(args.source_tokens, "--source-tokens") if args.source_tokens else None,
    )
    err = Console(stderr=True)
    contenders = [contender(args, groups) for groups in parse_counts(args.groups, "--groups")]
    measured = bench(contenders, settings, on_point=lambda point: err.print(point_line(point), highlight=False))
    show_bench(measured)
    if args.out is not None:
        shape = {
            "shape": args.shape,
            "layers": args.layers,
            "width": args.width,
            "heads": args.heads,
            "vocab": args.vocab,
        }
        write_json(args.out, measured.to_json() | {"model": shape})


if __name__ == "__main__":
    main()
