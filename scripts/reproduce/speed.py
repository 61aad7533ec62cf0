"""Decode time by the number of KV heads, on models of random weights: trained weights would take as long."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from untrained import decoder_config, write_untrained

if TYPE_CHECKING:
    import torch
    from scales import DecodeShape, Scale, Shape


def figure_6(scale: Scale) -> dict[str, Any]:
    """Time per sample for every number of groups that divides the heads, all heads (MHA) first."""
    heads = scale.decode.shape.heads
    groups = [count for count in range(heads, 0, -1) if heads % count == 0]
    return measure("decoder", scale, [(f"{count} groups", scale.decode.shape, count) for count in groups])


def table_1(family: str, scale: Scale) -> dict[str, Any]:
    """Time per sample of the four models of Table 1, at the shapes that were trained."""
    return measure(
        family,
        scale,
        [
            ("MHA large", scale.large, scale.large.heads),
            ("MHA small", scale.small, scale.small.heads),
            ("GQA large", scale.large, scale.gqa_groups),
            ("MQA large", scale.large, 1),
        ],
    )


def measure(family: str, scale: Scale, models: list[tuple[str, Shape, int]]) -> dict[str, Any]:
    """Benchmark models beside each other, the base first.

    A decoder writes behind a cache of `decode.context` tokens; a T5 beside an input as long, with half of the
    output written.
    """
    import torch

    from gqa_convert.evaluate.decode.bench import bench
    from gqa_convert.evaluate.decode.contender import Contender
    from gqa_convert.evaluate.decode.settings import BenchSettings

    decode = scale.decode
    make = {"decoder": _decoder, "t5": _t5}[family]
    contenders = [
        Contender(name=name, query_heads=shape.heads, kv_heads=kv_heads, model=make(scale, shape, kv_heads))
        for name, shape, kv_heads in models
    ]
    measured = bench(
        contenders,
        BenchSettings(
            batches=(decode.batch,),
            contexts=(decode.context if family == "decoder" else decode.output_tokens // 2,),
            source_tokens=None if family == "decoder" else decode.context,
            caches=("static",),
            steps=decode.steps,
            rounds=decode.rounds,
            prefill_tokens=1,
        ),
    )
    point = measured.points[0]
    if point.skipped:
        raise SystemExit(f"decode time: {point.skipped}")
    return {
        "device": measured.device,
        "dtype": measured.dtype,
        "threads": torch.get_num_threads(),
        "batch": decode.batch,
        "context": decode.context,
        "output_tokens": decode.output_tokens,
        "models": {
            model.name: {
                "kv_heads": model.kv_heads,
                "seconds_per_sample": _per_sample(decode, model.seconds.median),
                "quartiles": [_per_sample(decode, value) for value in (model.seconds.low, model.seconds.high)],
                "cache_bytes": model.cache_bytes,
                "time_ratio": model.time_ratio.median if model.time_ratio else 1.0,
            }
            for model in point.models
        },
    }


def _per_sample(decode: DecodeShape, step_seconds: float) -> float:
    return step_seconds * decode.output_tokens / decode.batch


def _decoder(scale: Scale, shape: Shape, kv_heads: int) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    decode = scale.decode
    config = decoder_config(
        shape, vocabulary=decode.vocabulary, context=decode.context + decode.steps + 1, kv_heads=kv_heads
    )
    torch.manual_seed(0)
    device, dtype = _place(scale)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def _t5(scale: Scale, shape: Shape, kv_heads: int) -> Any:
    """A T5, converted by the package where it has fewer KV heads."""
    from transformers import AutoModelForSeq2SeqLM

    from gqa_convert import convert

    device, dtype = _place(scale)
    with TemporaryDirectory() as work:
        folder = Path(work) / "mha"
        write_untrained(folder, "t5", shape, scale, 0)
        if kv_heads < shape.heads:
            folder = convert(folder, groups=kv_heads, out=Path(work) / "converted").out
        return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval().to(device)


def _place(scale: Scale) -> tuple[torch.device, torch.dtype]:
    from gqa_convert.hf.loading import pick_device

    device = pick_device("cpu" if scale.device == "cpu" else "auto")
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32
