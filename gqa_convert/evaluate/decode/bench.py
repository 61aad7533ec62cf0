"""Run models beside each other over batch x context.

Rounds are interleaved: every round times every model once, in an order that turns, so that a machine that slows down or
speeds up does so for all of them, and ratios are taken round by round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import Any

import torch

from gqa_convert.errors import UsageError
from gqa_convert.evaluate.decode.decoder import CACHES, MODES, Decoder, bytes_read_per_step, prefill_seconds
from gqa_convert.evaluate.decode.device import available_memory, describe, peak_memory, read_bandwidth
from gqa_convert.evaluate.decode.results import Bench, Capacity, DecodeResult, Point, Spread, verdict
from gqa_convert.evaluate.models import cache_bytes_per_token, dtype_name

_SHARE_OF_MEMORY = 0.8
"""Of the memory that is free: leave some for attention's own buffers and the rest of the machine."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A loaded model in the benchmark; the first one is the base."""

    name: str
    query_heads: int
    kv_heads: int
    model: Any


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to run.

    Attributes:
        batches: sequences decoded together.
        contexts: tokens in the cache.
        caches: `dynamic`, `static`.
        mode: see `Decoder`.
        steps: tokens decoded a round.
        rounds: timed rounds a point, after one that is not.
        prefill_tokens: leave prefill out where batch x context is more than this; 0: always.
        memory: bytes for which to say how many sequences fit; None: not.
    """

    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (512, 2048)
    caches: tuple[str, ...] = ("dynamic", "static")
    mode: str = "eager"
    steps: int = 8
    rounds: int = 7
    prefill_tokens: int = 4096
    memory: int | None = None

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.caches if kind not in CACHES]
        if wrong:
            raise UsageError(f"--cache {wrong[0]}: choose from {', '.join(CACHES)}.")
        if self.mode not in MODES:
            raise UsageError(f"--mode {self.mode}: choose one of {', '.join(MODES)}.")
        if self.mode != "eager" and self.caches != ("static",):
            raise UsageError(f"--mode {self.mode}: needs --cache static, whose tensors stay where they are.")
        if min((*self.batches, *self.contexts, self.steps, self.rounds, len(self.batches), len(self.contexts))) < 1:
            raise UsageError("--batch, --context, --steps and --rounds must be at least 1.")


def bench(
    contenders: Sequence[Contender],
    settings: BenchSettings,
    *,
    on_point: Callable[[Point], None] | None = None,
) -> Bench:
    """Benchmark models that are in memory together.

    Args:
        contenders: the base first.
        settings: what to run.
        on_point: called after each point.

    Raises:
        UsageError: if the settings do not fit the device, or two models share a name.
        UnsupportedModelError: if a model is not decoder-only with a cache of keys and values.
    """
    device = next(contenders[0].model.parameters()).device
    if settings.mode == "graph" and device.type != "cuda":
        raise UsageError("--mode graph: CUDA graphs need a CUDA device. Use --mode eager or compile here.")
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise UsageError(f"two models are called {next(n for n in names if names.count(n) > 1)}: rename a folder.")
    bandwidth = read_bandwidth(device)
    made = []
    for kind in settings.caches:
        for context in settings.contexts:
            for batch in settings.batches:
                point = _point(contenders, settings, kind, batch, context, bandwidth)
                made.append(point)
                if on_point is not None:
                    on_point(point)
    return Bench(
        device=describe(device),
        dtype=dtype_name(contenders[0].model),
        bandwidth=bandwidth,
        steps=settings.steps,
        rounds=settings.rounds,
        versions={name: installed_version(name) for name in ("gqa-convert", "torch", "transformers")},
        weights={c.name: weight_bytes(c.model) for c in contenders},
        weights_read={c.name: bytes_read_per_step(c.model) for c in contenders},
        points=tuple(made),
        capacities=_capacities(contenders, settings),
    )


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters, tied ones counted once."""
    return sum(p.nbytes for p in model.parameters())


def _point(
    contenders: Sequence[Contender], settings: BenchSettings, kind: str, batch: int, context: int, bandwidth: float
) -> Point:
    decoders = [
        Decoder(c.model, cache_kind=kind, mode=settings.mode, batch=batch, context=context, steps=settings.steps)
        for c in contenders
    ]
    device = decoders[0].device
    expected = [cache_bytes_per_token(c.model) * batch * (context + settings.steps) for c in contenders]
    free = available_memory(device)
    # A growing cache is copied layer by layer, so a quarter more is asked for than it holds.
    if free is not None and max(expected) * 1.25 > free * _SHARE_OF_MEMORY:
        why = f"a cache of {max(expected) / 2**30:.1f} GiB does not fit in {free / 2**30:.1f} GiB of free memory"
        return Point(batch=batch, context=context, cache=kind, mode=settings.mode, skipped=why)
    keep = free is None or sum(expected) * 1.25 <= free * _SHARE_OF_MEMORY or settings.mode != "eager"
    try:
        seconds, held, rises = _rounds(decoders, settings.rounds, keep)
        prefills = _prefills(contenders, settings, batch, context) if kind == settings.caches[0] else None
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        return Point(batch=batch, context=context, cache=kind, mode=settings.mode, skipped="out of memory")
    finally:
        for decoder in decoders:
            decoder.drop()
        gc.collect()
    models = tuple(
        _result(contenders, i, batch, seconds, held, rises[i], prefills, bandwidth) for i in range(len(contenders))
    )
    return Point(batch=batch, context=context, cache=kind, mode=settings.mode, models=models)


def _rounds(
    decoders: Sequence[Decoder], rounds: int, keep: bool
) -> tuple[list[list[float]], list[int], list[int | None]]:
    """Return seconds a step (one list a model), bytes of the caches, and how far memory rises in a step."""
    seconds: list[list[float]] = [[] for _ in decoders]
    held, rises = [0] * len(decoders), [None] * len(decoders)  # type: tuple[list[int], list[int | None]]
    for number in range(rounds + 1):
        for turn in range(len(decoders)):
            i = (turn + number) % len(decoders)
            decoder = decoders[i]
            if number == 0 or not keep:
                decoder.build()
                held[i] = decoder.cache_bytes
                decoder.seconds_per_step()
            if number == 0:
                with peak_memory(decoder.device) as peak:
                    decoder.seconds_per_step()
                rises[i] = peak.bytes
            else:
                seconds[i].append(decoder.seconds_per_step())
            if not keep:
                decoder.drop()
    return seconds, held, rises


def _prefills(
    contenders: Sequence[Contender], settings: BenchSettings, batch: int, context: int
) -> list[list[float]] | None:
    if batch * context > settings.prefill_tokens:
        return None
    found: list[list[float]] = [[] for _ in contenders]
    for number in range(settings.rounds + 1):
        for turn in range(len(contenders)):
            i = (turn + number) % len(contenders)
            seconds = prefill_seconds(contenders[i].model, batch=batch, context=context)
            if number:
                found[i].append(seconds)
    return found


def _result(
    contenders: Sequence[Contender],
    i: int,
    batch: int,
    seconds: list[list[float]],
    held: list[int],
    rise: int | None,
    prefills: list[list[float]] | None,
    bandwidth: float,
) -> DecodeResult:
    floors = [(bytes_read_per_step(c.model) + cache) / bandwidth for c, cache in zip(contenders, held, strict=True)]
    own = Spread.of(seconds[i])
    ratio = _ratios(seconds, i)
    return DecodeResult(
        name=contenders[i].name,
        query_heads=contenders[i].query_heads,
        kv_heads=contenders[i].kv_heads,
        seconds=own,
        tokens_per_second=batch / own.median,
        cache_bytes=held[i],
        cache_ratio=held[i] / held[0],
        step_bytes=rise,
        peak_bytes=None if rise is None else weight_bytes(contenders[i].model) + held[i] + rise,
        floor_seconds=floors[i],
        floor_share=floors[i] / own.median,
        time_ratio=ratio,
        floor_ratio=floors[i] / floors[0],
        prefill_seconds=Spread.of(prefills[i]) if prefills else None,
        prefill_ratio=_ratios(prefills, i) if prefills else None,
        verdict="base" if ratio is None else verdict(ratio),
    )


def _ratios(seconds: list[list[float]], i: int) -> Spread | None:
    """Time of model i over the base's, round by round; None for the base itself."""
    if i == 0:
        return None
    return Spread.of([own / base for own, base in zip(seconds[i], seconds[0], strict=True)])


def _capacities(contenders: Sequence[Contender], settings: BenchSettings) -> tuple[Capacity, ...]:
    """How many sequences fit, from the bytes a token takes as measured; attention's own buffers are not counted."""
    if settings.memory is None:
        return ()
    return tuple(
        Capacity(
            name=c.name,
            context=context,
            memory_bytes=settings.memory,
            sequences=max(0, settings.memory - weight_bytes(c.model)) // (cache_bytes_per_token(c.model) * context),
        )
        for context in settings.contexts
        for c in contenders
    )
