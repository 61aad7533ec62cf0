"""Time decoding in an engine over batch x context, models beside each other.

Every model is loaded by a process of its own, and rounds are interleaved as in the benchmark of transformers: every
round times every model once, in an order that turns. While one decodes, the others wait for a question.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.dtypes import named_float
from gqa_convert.checkpoint.provenance import versions
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import UnsupportedModelError, UsageError, check_choice
from gqa_convert.evaluate import models
from gqa_convert.evaluate.decode.device import describe, read_bandwidth
from gqa_convert.evaluate.decode.results import Bench, DecodeResult, Point, Spread, Throughput, ratios, verdict
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.engines.known import ENGINES, Engine
from gqa_convert.evaluate.engines.process import LOAD_S, EngineFailed, EngineProcess, find_python

MOST_REQUESTS = 64
"""Sequences that are decoded together at most for a throughput, whatever the memory would hold."""
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_SETTLE_S = 0.25
"""Between turns: OpenMP's threads spin so long after their last work, and would take a core from the next model."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A model that an engine has loaded; `read_share`: of its weights' bytes, those that decoding a token reads."""

    subject: models.Subject
    process: EngineProcess
    facts: dict[str, Any]
    read_share: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights as the engine has them."""
        return int(self.facts["weight_bytes"])

    @property
    def weight_bytes_read(self) -> int:
        """Bytes of weights that a step reads."""
        return int(self.weight_bytes * self.read_share)

    def value(self, do: str, **arguments: Any) -> Any:
        """The answer to a question of `adapters/serve.py`."""
        return self.process.ask(do, **arguments)["value"]


def bench_engine(
    folders: Sequence[str | Path],
    engine: str,
    settings: BenchSettings,
    *,
    python: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_point: Callable[[Point], None] | None = None,
) -> Bench:
    """Benchmark models in an engine.

    Args:
        folders: folders or hub ids, the base first.
        engine: of `known.ENGINES`.
        settings: what to run; caches and mode are the engine's own.
        python: a Python that has the engine; None for this one.
        dtype: of weights and cache; `auto`: the engine's usual one.
        trust_remote_code: read checkpoints that bring code along.
        on_point: called after each point.

    Raises:
        UsageError: if the engine is unknown or not installed, or the settings do not fit.
        UnsupportedModelError: if the engine does not take a model.
    """
    check_choice("--engine", engine, ENGINES)
    known = ENGINES[engine]
    if dtype != "auto":
        dtype = str(named_float(dtype)).removeprefix("torch.")
        check_choice("--dtype", dtype, known.dtypes)
    chosen = find_python(known, python)
    subjects = [models.subject(str(folder), trust_remote_code=trust_remote_code) for folder in folders]
    _check(subjects, known, settings)
    import torch

    threads = torch.get_num_threads()
    longest = max(settings.contexts) + settings.steps + 8
    most = max(*settings.batches, MOST_REQUESTS if settings.cache_memory else 1)
    with ExitStack() as stack:
        runners = []
        for subject in subjects:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="gqa-engine-"))
            process = stack.enter_context(EngineProcess(known, chosen, threads=threads))
            asked = {"dtype": dtype, "threads": threads, "batch": most, "tokens": longest}
            try:
                facts = process.ask("load", limit_s=LOAD_S, folder=str(subject.folder.resolve()), work=work, **asked)
            except EngineFailed as error:
                raise UnsupportedModelError(
                    f"{subject.name}: {engine} does not take it ({error}). See the table of docs/serving.md."
                ) from error
            share = _read_share(subject.source.checkpoint)
            runners.append(Runner(subject=subject, process=process, facts=facts, read_share=share))
        device = torch.device(runners[0].facts.get("device", "cpu"))
        bandwidth = read_bandwidth(device)
        points = []
        for context in settings.contexts:
            for batch in settings.batches:
                point = _point(runners, known, settings, batch, context, bandwidth)
                points.append(point)
                if on_point is not None:
                    on_point(point)
        if not any(point.models for point in points):
            raise UnsupportedModelError(f"--engine {engine}: nothing could be timed ({points[0].skipped}).")
        throughputs = [t for context in settings.contexts for t in _throughputs(runners, settings, context)]
    first = runners[0].facts
    return Bench(
        device=describe(device),
        dtype=first["dtype"],
        bandwidth=bandwidth,
        steps=settings.steps,
        rounds=settings.rounds,
        versions=versions(),
        weights={r.subject.name: r.weight_bytes for r in runners},
        weights_read={r.subject.name: r.weight_bytes_read for r in runners},
        points=tuple(points),
        engine=engine,
        engine_version=first["version"],
        cache_source=first["cache"],
        throughputs=tuple(throughputs),
    )


def _check(subjects: Sequence[models.Subject], engine: Engine, settings: BenchSettings) -> None:
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise UsageError(f"two models are called {max(names, key=names.count)}: rename a folder.")
    for subject in subjects:
        if subject.is_encoder_decoder:
            raise UsageError(f"--engine {engine.name}: {subject.name} has an encoder; decoders are timed alone.")
        if too_long := _too_long(subject, min(settings.contexts) + settings.steps):
            raise UsageError(f"--cache-context {min(settings.contexts)}: {too_long}.")


def _too_long(subject: models.Subject, tokens: int) -> str:
    """Say that a model is made for fewer tokens; empty if it is not."""
    longest = subject.max_context
    return "" if longest is None or tokens <= longest else f"{subject.name} is made for {longest} tokens"


def _read_share(checkpoint: Checkpoint) -> float:
    """Of a checkpoint's weights, the share that decoding one token reads.

    Of an embedding one row is read, so it counts only where the output layer is the same; of experts those that are
    chosen for the token.
    """
    config = checkpoint.config.get("text_config") or checkpoint.config
    tied = config.get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings", False))
    heads = any(key.endswith(("lm_head.weight", "embed_out.weight", "output.weight")) for key in checkpoint.tensors)
    experts = next((config[n] for n in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(n)), 0)
    chosen = config.get("num_experts_per_tok") or experts
    total = read = 0.0
    for key, info in checkpoint.tensors.items():
        size = float(math.prod(info.shape))
        total += size
        if key.endswith(_EMBEDDINGS) and not tied and heads:
            continue
        read += size * chosen / experts if experts and ".experts." in key else size
    return read / total


def _point(
    runners: Sequence[Runner], engine: Engine, settings: BenchSettings, batch: int, context: int, bandwidth: float
) -> Point:
    def point(**more: Any) -> Point:
        kind = f"{engine.name} {runners[0].facts['cache_dtype']}"
        return Point(batch=batch, context=context, cache=kind, mode="eager", **more)

    too_long = [why for r in runners if (why := _too_long(r.subject, context + settings.steps))]
    if too_long:
        return point(skipped=too_long[0])
    try:
        held, seconds = _decoded(runners, settings, [batch] * len(runners), context)
        prefills = None
        if batch * context <= settings.prefill_tokens:
            prefills = _in_turn(
                runners, settings.rounds, lambda r: float(r.value("prefill", batch=batch, context=context))
            )
    except EngineFailed as error:
        return point(skipped=str(error))
    floors = [(r.weight_bytes_read + cache) / bandwidth for r, cache in zip(runners, held, strict=True)]
    results = []
    for i, runner in enumerate(runners):
        own, ratio = Spread.of(seconds[i]), ratios(seconds, i)
        results.append(
            DecodeResult(
                name=runner.subject.name,
                query_heads=runner.subject.query_heads,
                kv_heads=runner.subject.kv_heads,
                kv_heads_per_layer=runner.subject.per_layer,
                seconds=own,
                tokens_per_second=batch / own.median,
                cache_bytes=held[i],
                cache_ratio=held[i] / held[0] if held[0] else 1.0,
                self_cache_bytes=held[i],
                step_bytes=None,
                peak_bytes=None,
                floor_seconds=floors[i],
                floor_share=floors[i] / own.median,
                time_ratio=ratio,
                floor_ratio=floors[i] / floors[0],
                prefill_seconds=Spread.of(prefills[i]) if prefills else None,
                prefill_ratio=ratios(prefills, i) if prefills else None,
                verdict="base" if ratio is None else verdict(ratio),
            )
        )
    return point(models=tuple(results))


def _decoded(
    runners: Sequence[Runner], settings: BenchSettings, batches: Sequence[int], context: int
) -> tuple[list[int], list[list[float]]]:
    """Bytes of each model's cache, and its seconds per step over the rounds; each has a batch of its own."""
    try:
        for runner, batch in zip(runners, batches, strict=True):
            runner.value("fill", batch=batch, context=context, room=settings.steps + 2)
        steps = settings.steps
        seconds = _in_turn(runners, settings.rounds, lambda r: float(r.value("steps", count=steps)) / steps)
        held = [int(runner.value("cache_bytes")) for runner in runners]
    finally:
        for runner in runners:
            runner.value("drop")
    return held, seconds


def _in_turn(runners: Sequence[Runner], rounds: int, measure: Callable[[Runner], float]) -> list[list[float]]:
    """Measure each runner once per round, after one round that does not count, in an order that turns."""
    seen: list[list[float]] = [[] for _ in runners]
    for number in range(rounds + 1):
        for turn in range(len(runners)):
            i = (turn + number) % len(runners)
            if len(runners) > 1:
                time.sleep(_SETTLE_S)
            value = measure(runners[i])
            if number:
                seen[i].append(value)
    return seen


def _throughputs(runners: Sequence[Runner], settings: BenchSettings, context: int) -> list[Throughput]:
    """What fixed memory for the cache holds at a time, and how fast the engine decodes so many together."""
    memory = settings.cache_memory
    if memory is None or any(_too_long(r.subject, context + settings.steps) for r in runners):
        return []
    try:
        requests = []
        for runner in runners:
            runner.value("fill", batch=1, context=context, room=settings.steps + 2)
            runner.value("steps", count=1)
            each = runner.value("cache_bytes") / context * (context + settings.steps)
            runner.value("drop")
            requests.append(int(memory // max(each, 1)))
        run = [min(count, MOST_REQUESTS) for count in requests]
        some = [(runner, count) for runner, count in zip(runners, run, strict=True) if count]
        _, seconds = _decoded([r for r, _ in some], settings, [count for _, count in some], context)
    except EngineFailed as error:
        return [Throughput(name="", context=context, memory_bytes=memory, requests=0, run=0, skipped=str(error))]
    times = {runner.subject.name: Spread.of(each) for (runner, _), each in zip(some, seconds, strict=True)}
    results = []
    for runner, count, together in zip(runners, requests, run, strict=True):
        own = times.get(runner.subject.name)
        results.append(
            Throughput(
                name=runner.subject.name,
                context=context,
                memory_bytes=memory,
                requests=count,
                run=together,
                seconds=own,
                tokens_per_second=None if own is None else together / own.median,
            )
        )
    return results
