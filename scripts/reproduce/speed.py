"""Decode time by the number of KV heads, on models of random weights: trained weights would take as long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from untrained import decoder_config

if TYPE_CHECKING:
    from scales import DecodeShape, Scale, Shape


def figure_6(scale: Scale) -> dict[str, Any]:
    """Time per sample for every number of groups that divides the heads, all heads (MHA) first."""
    heads = scale.decode.shape.heads
    groups = [count for count in range(heads, 0, -1) if heads % count == 0]
    return measure(scale, [(f"{count} groups", scale.decode.shape, count) for count in groups])


def table_1(scale: Scale) -> dict[str, Any]:
    """Time per sample of the four models of Table 1, at the shapes that were trained."""
    return measure(
        scale,
        [
            ("MHA large", scale.large, scale.large.heads),
            ("MHA small", scale.small, scale.small.heads),
            ("GQA large", scale.large, scale.gqa_groups),
            ("MQA large", scale.large, 1),
        ],
    )


def measure(scale: Scale, models: list[tuple[str, Shape, int]]) -> dict[str, Any]:
    """Benchmark models beside each other, the base first."""
    import torch

    from gqa_convert.evaluate.decode.bench import bench
    from gqa_convert.evaluate.decode.contender import Contender
    from gqa_convert.evaluate.decode.settings import BenchSettings

    decode = scale.decode
    contenders = [
        Contender(name=name, query_heads=shape.heads, kv_heads=kv_heads, model=_model(scale, shape, kv_heads))
        for name, shape, kv_heads in models
    ]
    found = bench(
        contenders,
        BenchSettings(
            batches=(decode.batch,),
            contexts=(decode.context,),
            caches=("static",),
            steps=decode.steps,
            rounds=decode.rounds,
            prefill_tokens=1,
        ),
    )
    point = found.points[0]
    if point.skipped:
        raise SystemExit(f"decode time: {point.skipped}")
    return {
        "device": found.device,
        "dtype": found.dtype,
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


def _model(scale: Scale, shape: Shape, kv_heads: int) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    from gqa_convert.evaluate.models import DTYPES, pick_device

    decode = scale.decode
    config = decoder_config(
        shape, vocabulary=decode.vocabulary, context=decode.context + decode.steps + 1, kv_heads=kv_heads
    )
    torch.manual_seed(0)
    device = pick_device("cpu" if scale.device == "cpu" else "auto")
    dtype = DTYPES["bfloat16" if device.type == "cuda" else "float32"]
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()
