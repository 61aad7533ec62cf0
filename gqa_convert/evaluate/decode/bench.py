"""Run models beside each other over batch x context.

Rounds are interleaved: every round times every model once, in an order that turns, so that a machine that slows down or
speeds up does so for all of them, and ratios are taken round by round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from gqa_convert.checkpoint.provenance import versions
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.decode.contender import Contender
from gqa_convert.evaluate.decode.decoder import Decoder, prefill_seconds
from gqa_convert.evaluate.decode.device import available_memory, describe, peak_memory, read_bandwidth
from gqa_convert.evaluate.decode.results import Bench, Capacity, DecodeResult, Point, Spread, ratios, verdict
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.models import dtype_name

_SHARE_OF_MEMORY = 0.8
"""Of the memory that is free: leave some for attention's own buffers and the rest of the machine."""


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
        UsageError: if the settings do not fit the device or the models, or two models share a name.
        UnsupportedModelError: if a model does not keep a cache of keys and values.
    """
    device = next(contenders[0].model.parameters()).device
    if settings.mode == "graph" and device.type != "cuda":
        raise UsageError("--mode graph: CUDA graphs need a CUDA device. Use --mode eager or compile here.")
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise UsageError(f"two models are called {next(n for n in names if names.count(n) > 1)}: rename a folder.")
    _check_encoders(contenders, settings)
    bandwidth = read_bandwidth(device)
    points = []
    for kind in settings.caches:
        for context in settings.contexts:
            for batch in settings.batches:
                point = _point(contenders, settings, kind, batch, context, bandwidth)
                points.append(point)
                if on_point is not None:
                    on_point(point)
    return Bench(
        device=describe(device),
        dtype=dtype_name(contenders[0].model),
        bandwidth=bandwidth,
        steps=settings.steps,
        rounds=settings.rounds,
        versions=versions(),
        weights={c.name: c.weight_bytes for c in contenders},
        weights_read={c.name: c.weight_bytes_read for c in contenders},
        points=tuple(points),
        capacities=_capacities(contenders, settings),
    )


def _check_encoders(contenders: Sequence[Contender], settings: BenchSettings) -> None:
    with_encoder = [c.name for c in contenders if c.has_encoder]
    without = [c.name for c in contenders if not c.has_encoder]
    if with_encoder and without:
        raise UsageError(f"{with_encoder[0]} has an encoder and {without[0]} has none: their times do not compare.")
    if without and settings.source_tokens is not None:
        raise UsageError(f"--source-tokens: {without[0]} has no encoder.")


def _source(contenders: Sequence[Contender], settings: BenchSettings, context: int) -> int | None:
    """Positions of the encoder's output at a context; None where there is no encoder."""
    return (settings.source_tokens or context) if contenders[0].has_encoder else None


def _point(
    contenders: Sequence[Contender], settings: BenchSettings, kind: str, batch: int, context: int, bandwidth: float
) -> Point:
    source = _source(contenders, settings, context)

    def left_out(why: str) -> Point:
        return Point(batch=batch, context=context, source_tokens=source, cache=kind, mode=settings.mode, skipped=why)

    too_long = [why for c in contenders if (why := c.too_long(context + settings.steps, source))]
    if too_long:
        return left_out(too_long[0])
    decoders = [
        Decoder(
            c.model,
            cache_kind=kind,
            mode=settings.mode,
            batch=batch,
            context=context,
            steps=settings.steps,
            source=source,
        )
        for c in contenders
    ]
    device = decoders[0].device
    expected = [c.sequence_bytes(context + settings.steps, source) * batch for c in contenders]
    free = available_memory(device)
    # A growing cache is copied layer by layer, so a quarter more is asked for than it holds.
    if free is not None and max(expected) * 1.25 > free * _SHARE_OF_MEMORY:
        return left_out(
            f"a cache of {max(expected) / 2**30:.1f} GiB does not fit in {free / 2**30:.1f} GiB of free memory"
        )
    keep = free is None or sum(expected) * 1.25 <= free * _SHARE_OF_MEMORY or settings.mode != "eager"
    try:
        seconds, held, rises = _rounds(decoders, settings.rounds, keep)
        prefills = _prefills(contenders, settings, batch, context, source) if kind == settings.caches[0] else None
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        return left_out("out of memory")
    finally:
        for decoder in decoders:
            decoder.drop()
        gc.collect()
    models = tuple(
        _result(contenders, i, batch, seconds, held, rises[i], prefills, bandwidth) for i in range(len(contenders))
    )
    return Point(batch=batch, context=context, source_tokens=source, cache=kind, mode=settings.mode, models=models)


def _rounds(
    decoders: Sequence[Decoder], rounds: int, keep: bool
) -> tuple[list[list[float]], list[tuple[int, int]], list[int | None]]:
    """Return seconds per step (one list per model), bytes of own and cross caches, how far memory rises per step."""
    seconds: list[list[float]] = [[] for _ in decoders]
    held = [(0, 0)] * len(decoders)
    rises: list[int | None] = [None] * len(decoders)
    for number in range(rounds + 1):
        for turn in range(len(decoders)):
            i = (turn + number) % len(decoders)
            decoder = decoders[i]
            if number == 0 or not keep:
                decoder.build()
                held[i] = decoder.cache_bytes, decoder.cross_cache_bytes
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
    contenders: Sequence[Contender], settings: BenchSettings, batch: int, context: int, source: int | None
) -> list[list[float]] | None:
    if batch * (context if source is None else source) > settings.prefill_tokens:
        return None
    seconds_by_model: list[list[float]] = [[] for _ in contenders]
    for number in range(settings.rounds + 1):
        for turn in range(len(contenders)):
            i = (turn + number) % len(contenders)
            seconds = prefill_seconds(contenders[i].model, batch=batch, context=context, source=source)
            if seconds is None:
                return None
            if number:
                seconds_by_model[i].append(seconds)
    return seconds_by_model


def _result(
    contenders: Sequence[Contender],
    i: int,
    batch: int,
    seconds: list[list[float]],
    held: list[tuple[int, int]],
    rise: int | None,
    prefills: list[list[float]] | None,
    bandwidth: float,
) -> DecodeResult:
    caches = [sum(both) for both in held]
    floors = [(c.weight_bytes_read + cache) / bandwidth for c, cache in zip(contenders, caches, strict=True)]
    own = Spread.of(seconds[i])
    ratio = ratios(seconds, i)
    return DecodeResult(
        name=contenders[i].name,
        query_heads=contenders[i].query_heads,
        kv_heads=contenders[i].kv_heads,
        kv_heads_per_layer=contenders[i].kv_heads_per_layer,
        seconds=own,
        tokens_per_second=batch / own.median,
        cache_bytes=caches[i],
        cache_ratio=caches[i] / caches[0],
        self_cache_bytes=held[i][0],
        cross_cache_bytes=held[i][1],
        step_bytes=rise,
        peak_bytes=None if rise is None else contenders[i].weight_bytes + caches[i] + rise,
        floor_seconds=floors[i],
        floor_share=floors[i] / own.median,
        time_ratio=ratio,
        floor_ratio=floors[i] / floors[0],
        prefill_seconds=Spread.of(prefills[i]) if prefills else None,
        prefill_ratio=ratios(prefills, i) if prefills else None,
        verdict="base" if ratio is None else verdict(ratio),
    )


def _capacities(contenders: Sequence[Contender], settings: BenchSettings) -> tuple[Capacity, ...]:
    """How many sequences fit, from the bytes per token as measured; attention's own buffers are not counted."""
    if settings.memory is None:
        return ()
    return tuple(
        Capacity(
            name=c.name,
            context=context,
            source_tokens=_source(contenders, settings, context),
            memory_bytes=settings.memory,
            sequences=max(0, settings.memory - c.weight_bytes)
            // c.sequence_bytes(context, _source(contenders, settings, context)),
        )
        for context in settings.contexts
        for c in contenders
    )
