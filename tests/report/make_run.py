"""A run folder as a sweep leaves it, without running one."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gqa_convert.evaluate.decode.results import Bench, DecodeResult, Point, Spread
from gqa_convert.evaluate.metric import Figure
from gqa_convert.evaluate.results import Comparison, Evaluation, ModelResult, Part
from gqa_convert.evaluate.samples import Sample
from gqa_convert.evaluate.sweep.points import SweepPoint, recommend

HOSTILE = '<script>alert("x")</script>'


def model(name: str, kv_heads: int, loss: float) -> ModelResult:
    figures = {
        "loss": Figure(loss, (loss - 0.1, loss + 0.1)),
        "perplexity": Figure(math.exp(loss)),
        "bits_per_byte": Figure(1.0),
        "kv_cache_bytes_per_token": Figure(256 * kv_heads),
        "parameters": Figure(1000 + kv_heads),
    }
    return ModelResult(name=name, query_heads=8, kv_heads=kv_heads, figures=figures)


def evaluation(*converted: Comparison) -> Evaluation:
    return Evaluation(
        task="next token", data="poems.jsonl", context=128, stride=64, windows=10, tokens=1000, bytes=3000,
        dtype="float32", device="cpu, 1 threads", settings={}, versions={"torch": "2.13.0"},
        base=model("tiny", 8, 4.0), converted=converted,
    )  # fmt: skip


def comparison(name: str, kv_heads: int, rise: float) -> Comparison:
    figures = {
        "loss_difference": Figure(rise, (rise - 0.01, rise + 0.01)),
        "kl": Figure(rise, (rise, rise)),
        "top1_agreement": Figure(0.9, (0.9, 0.9)),
        "cache_ratio": Figure(kv_heads / 8),
    }
    parts = tuple(
        Part(
            by=by, name=what, tokens=500, loss=4.0, loss_difference=figures["loss_difference"], kl=Figure(rise),
            top1_agreement=figures["top1_agreement"], kl_share=0.5,
        )
        for by, what in (("kind", "word"), ("kind", "number"), ("position", "1-15"), ("position", "16-31"))
    )  # fmt: skip
    return Comparison(model=model(name, kv_heads, 4.0 + rise), figures=figures, seconds=1.0, parts=parts)


def samples(name: str) -> tuple[Sample, ...]:
    """Two beginnings, continued by the original and by one conversion."""
    return tuple(
        Sample(prompt=prompt, texts=tuple((who, f"{who} goes on") for who in ("tiny", name)))
        for prompt in ("<b>once</b>", "long ago")
    )


def bench(name: str, ratio: float) -> Bench:
    def one(who: str, heads: int, times: Spread | None, word: str) -> DecodeResult:
        return DecodeResult(
            name=who, query_heads=8, kv_heads=heads, seconds=Spread(0.01, 0.009, 0.011), tokens_per_second=800,
            cache_bytes=1 << 20, cache_ratio=heads / 8, step_bytes=100, peak_bytes=2 << 20, floor_seconds=0.005,
            floor_share=0.5, time_ratio=times, floor_ratio=0.5, prefill_seconds=None, prefill_ratio=None, verdict=word,
        )  # fmt: skip

    models = (one("tiny", 8, None, "base"), one(name, 2, Spread(ratio, ratio, ratio), "faster"))
    return Bench(
        device="a processor", dtype="float32", bandwidth=1e10, steps=8, rounds=7, versions={}, weights={"tiny": 100},
        weights_read={"tiny": 100},
        points=(
            Point(batch=8, context=2048, cache="static", mode="eager", models=models),
            Point(batch=64, context=8192, cache="static", mode="eager", skipped="does not fit"),
        ),
    )  # fmt: skip


def write_run(folder: Path, *, tolerance: float = 0.05, failed: bool = True) -> Path:
    """Write sweep.json, point.json files, sensitivity, similarity and an uptraining log."""
    points = []
    for variant, groups, rise in (("mean", 4, 0.02), ("mean", 2, 0.2), ("pca", 2, 0.03)):
        name = f"{variant}-g{groups}"
        measured = comparison(name, groups, rise)
        figures = measured.model.figures | measured.figures | {"time_ratio": Figure(0.4 + groups / 20, None, "faster")}
        point = SweepPoint(name=name, variant=variant, groups=groups, status="done", figures=figures)
        points.append(point)
        recipe = {"method": variant, "fold": False}
        told = replace(evaluation(measured), samples=samples(name))
        detail = {"point": point.to_json(), "evaluation": told.to_json(), "recipe": recipe}
        _write(folder / "points" / name / "point.json", detail | {"bench": bench(name, 0.5).to_json()})
        _write(folder / "points" / name / "model" / "config.json", {"model_type": "llama"})
        source = {"name": "tiny", "hub": {"repo_id": "someone/tiny"}}
        _write(folder / "points" / name / "model" / "gqa_convert.json", {"source": source, "versions": {"torch": "2"}})
    if failed:
        points.append(SweepPoint(name="first-g2", variant="first", groups=2, status="failed", error=HOSTILE))
    sweep = {
        "kind": "sweep",
        "base": evaluation().to_json(),
        "points": [p.to_json() for p in points],
        "recommendation": vars(recommend(points, tolerance)),
    }
    _write(folder / "sweep.json", sweep)
    layers = [{"layer": f"l.{i}", "loss_difference": 0.01 * i, "interval": [0.0, 0.02 * i]} for i in range(3)]
    _write(folder / "sensitivity.json", {"point": "pca-g2", "layers": layers})
    alike = {"keys_before": 0.1, "keys_after": 0.5, "values_before": 0.0, "values_after": 0.3}
    _write(folder / "similarity.json", {"groups": 4, "layers": [{"layer": f"l.{i}"} | alike for i in range(3)]})
    log = [
        {"kind": kind, "step": s, "tokens_seen": s * 100, "loss": 5 - s / 10}
        for s in range(5)
        for kind in ("train", "evaluation")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"kind": "tr')
    return folder


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
