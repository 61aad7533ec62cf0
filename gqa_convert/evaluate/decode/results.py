"""The decode benchmark's results: plain values that turn into JSON, and what follows from them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from gqa_convert.evaluate.decode.settings import QUANTISED
from gqa_convert.heads import kv_heads_words
from gqa_convert.outcome import Outcome

NO_DIFFERENCE = 0.03
"""Time ratios within this of 1, or whose spread reaches there, are called no difference."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise; with fewer than two values the quartiles are the value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        quartiles = quantiles(values, n=4, method="inclusive")
        return cls(median(values), quartiles[0], quartiles[2])


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """One model at one point.

    Attributes:
        name: of the model.
        query_heads: of the model.
        kv_heads: of the model; where layers differ, of the one that has most.
        kv_heads_per_layer: where layers differ; else empty.
        seconds: per decoded token of every sequence (one step), over the rounds.
        tokens_per_second: over all sequences, from the median.
        cache_bytes: measured, of all sequences; with an encoder, both caches in sum.
        cache_ratio: of the base's cache, measured.
        step_bytes: how far memory rises during a step; None where the system does not tell.
        peak_bytes: weights, cache and `step_bytes`; None with it.
        floor_seconds: weights and cache over the measured bandwidth: no step can take less.
        floor_share: `floor_seconds` over the median.
        time_ratio: seconds over the base's, round by round; None for the base.
        floor_ratio: the same of the floors.
        prefill_seconds: to read the prompt (the context, or what the encoder reads); None where it was left out.
        prefill_ratio: over the base's, round by round; None likewise and for the base.
        verdict: `base`, `faster`, `slower`, `no difference`.
        self_cache_bytes: of `cache_bytes`, those of the decoder's own attention.
        cross_cache_bytes: of `cache_bytes`, those of the encoder's output; 0 without an encoder.
    """

    name: str
    query_heads: int
    kv_heads: int
    seconds: Spread
    tokens_per_second: float
    cache_bytes: int
    cache_ratio: float
    step_bytes: int | None
    peak_bytes: int | None
    floor_seconds: float
    floor_share: float
    time_ratio: Spread | None
    floor_ratio: float
    prefill_seconds: Spread | None
    prefill_ratio: Spread | None
    verdict: str
    self_cache_bytes: int = 0
    cross_cache_bytes: int = 0
    kv_heads_per_layer: tuple[int, ...] = ()

    @property
    def heads(self) -> str:
        """The KV heads in words."""
        return kv_heads_words(self.kv_heads, self.kv_heads_per_layer)


@dataclass(frozen=True, kw_only=True)
class Point:
    """All models at one batch and context, or why they were not run there.

    `source_tokens` are the positions of the encoder's output, None for models without an encoder.
    """

    batch: int
    context: int
    cache: str
    mode: str
    models: tuple[DecodeResult, ...] = ()
    skipped: str = ""
    source_tokens: int | None = None

    @property
    def where(self) -> str:
        """The point in words, the cache's kind aside."""
        return f"batch {self.batch}, {lengths(self.context, self.source_tokens)}"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Most sequences of `context` tokens, and of `source_tokens` read, that fit beside a model's weights in memory."""

    name: str
    context: int
    memory_bytes: int
    sequences: int
    source_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Requests of `context` tokens that fixed memory for the cache holds at a time, and their tokens per second.

    Attributes:
        name: of the model; empty where the engine failed.
        context: tokens of each request when decoding starts.
        memory_bytes: for the cache alone.
        requests: that fit.
        run: that were decoded together, at most `requests`.
        seconds: per step of all of them; None where none fits.
        tokens_per_second: over all of them, from the median; None likewise.
        skipped: why nothing was measured.
    """

    name: str
    context: int
    memory_bytes: int
    requests: int
    run: int
    seconds: Spread | None = None
    tokens_per_second: float | None = None
    skipped: str = ""


@dataclass(frozen=True, kw_only=True)
class Bench(Outcome):
    """A whole benchmark; `weights` are bytes of each model, `bandwidth` bytes per second as measured.

    `engine` is empty for transformers in this process; else `cache_source` says where the bytes of caches come from.
    """

    device: str
    dtype: str
    bandwidth: float
    steps: int
    rounds: int
    versions: dict[str, str]
    weights: dict[str, int]
    weights_read: dict[str, int]
    points: tuple[Point, ...]
    capacities: tuple[Capacity, ...] = ()
    engine: str = ""
    engine_version: str = ""
    cache_source: str = ""
    throughputs: tuple[Throughput, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The benchmark as JSON values, with its conclusions in words."""
        return {"format": 1, "kind": "bench"} | asdict(self) | {"conclusions": conclusions(self)}

    def table_rows(self) -> list[dict[str, Any]]:
        """A row per model and point; one of a point that was skipped says why."""
        rows = []
        for point in self.points:
            values = asdict(point)
            models = values.pop("models") or [{}]
            rows += [values | model for model in models]
        return rows


def lengths(context: int, source_tokens: int | None) -> str:
    """The tokens in the caches in words."""
    return f"context {context}" + ("" if source_tokens is None else f", source {source_tokens}")


def ratios(seconds: Sequence[Sequence[float]], i: int) -> Spread | None:
    """Time of model i over the base's, round by round; None for the base itself."""
    if i == 0:
        return None
    return Spread.of([own / base for own, base in zip(seconds[i], seconds[0], strict=True)])


def verdict(ratio: Spread) -> str:
    """Name a time ratio: a difference counts only where the quartiles lie clear of 1."""
    if ratio.high < 1 - NO_DIFFERENCE:
        return "faster"
    return "slower" if ratio.low > 1 + NO_DIFFERENCE else "no difference"


def conclusions(bench: Bench) -> list[str]:
    """Say in words, for each converted model, where it is faster, where it is not, and why."""
    lines = []
    names = dict.fromkeys(model.name for point in bench.points for model in point.models if model.time_ratio)
    for name in names:
        for kind in dict.fromkeys((point.cache, point.mode) for point in bench.points):
            lines += _of_one(bench, name, *kind)
    return lines + _of_formats(bench) + _of_throughput(bench)


def _of_formats(bench: Bench) -> list[str]:
    """For each model what storing its cache in fewer bits does to the time of a step, beside the dynamic cache."""
    whole = {(p.mode, p.batch, p.context, p.source_tokens): p.models for p in bench.points if p.cache == "dynamic"}
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in bench.points:
        where = (point.mode, point.batch, point.context, point.source_tokens)
        for small, large in zip(point.models, whole.get(where, ()), strict=False):
            if point.cache in QUANTISED:
                time = small.seconds.median / large.seconds.median
                ratios.setdefault((small.name, point.cache), []).append((time, small.cache_bytes / large.cache_bytes))
    return [
        f"{name}, {kind} cache: {_percent([size for _, size in seen])} of the bytes of its dynamic cache, in "
        f"{_percent([time for time, _ in seen])} of its time (points not interleaved; transformers restores all of the "
        "cache at every step, which engines do as they read it)."
        for (name, kind), seen in ratios.items()
    ]


def _of_throughput(bench: Bench) -> list[str]:
    """What each conversion serves in the memory that the base's cache has, beside the base."""
    lines = []
    by_context: dict[int, list[Throughput]] = {}
    for each in bench.throughputs:
        by_context.setdefault(each.context, []).append(each)
    for context, (base, *others) in by_context.items():
        for other in others:
            if base.tokens_per_second and other.tokens_per_second:
                capped = " (no more were run)" if other.run < other.requests else ""
                lines.append(
                    f"{other.name}, {bench.engine}: in the same memory for the cache {other.run} requests of {context} "
                    f"tokens at a time{capped} where {base.name} has {base.run}: "
                    f"x {other.tokens_per_second / base.tokens_per_second:.2f} the tokens per second."
                )
    return lines


def _of_one(bench: Bench, name: str, cache: str, mode: str) -> list[str]:
    runs = [
        (point, model, point.models[0])
        for point in bench.points
        if (point.cache, point.mode) == (cache, mode)
        for model in point.models
        if model.name == name
    ]
    if not runs:
        return []
    lines = []
    label = f"{name}, {cache} cache" + ("" if mode == "eager" else f", {mode}")
    faster = [run for run in runs if run[1].verdict == "faster"]
    if faster:
        point, model, _ = min(faster, key=lambda run: run[1].time_ratio.median if run[1].time_ratio else 1.0)
        assert model.time_ratio is not None
        lines.append(
            f"{label}: decodes faster at {len(faster)} of {len(runs)} points, most at {point.where}: "
            f"x {1 / model.time_ratio.median:.2f} (memory traffic alone would allow x {1 / model.floor_ratio:.2f})."
        )
    for kind, words in (("no difference", "gives nothing"), ("slower", "is slower")):
        there = [run for run in runs if run[1].verdict == kind]
        if there:
            shares = [base.cache_bytes / (base.cache_bytes + bench.weights_read[base.name]) for _, _, base in there]
            traffic = [base.floor_share for _, _, base in there]
            lines.append(
                f"{label}: {words} in decode time at {'; '.join(point.where for point, _, _ in there)}. There "
                f"the base's cache is {_percent(shares)} of the bytes a step reads, and reading them is "
                f"{_percent(traffic)} of its time."
            )
    ratios = [model.prefill_ratio for _, model, _ in runs if model.prefill_ratio is not None]
    if ratios:
        middle = [ratio.median for ratio in ratios]
        gains = sum(verdict(ratio) == "faster" for ratio in ratios)
        span = f"x {min(middle):.2f}" + (f" to x {max(middle):.2f}" if len(middle) > 1 else "")
        why = "." if gains else ": no clear gain, and none is due, for reading a prompt does not wait for the cache."
        lines.append(f"{label}: reading the prompt takes {span} of the base's time{why}")
    return lines


def _percent(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"
