"""Tables of the decode benchmark. Imports no torch."""

from __future__ import annotations

from rich.table import Table

from gqa_convert.console import size, wide_console
from gqa_convert.evaluate.decode.results import Bench, Capacity, DecodeResult, Point, Spread, Throughput, conclusions


def milliseconds(spread: Spread) -> str:
    """A time with its quartiles: `12.3 ms [12.1, 12.9]`."""
    return f"{spread.median * 1e3:.3g} ms [{spread.low * 1e3:.3g}, {spread.high * 1e3:.3g}]"


def times(spread: Spread | None) -> str:
    """A ratio of times with its quartiles, `-` for the base."""
    return "-" if spread is None else f"x {spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def point_line(point: Point) -> str:
    """One line for progress."""
    where = f"{point.cache} cache, {point.where}"
    if point.skipped:
        return f"{where}: left out, {point.skipped}"
    return f"{where}: " + ", ".join(f"{m.name} {m.seconds.median * 1e3:.3g} ms" for m in point.models)


def show_bench(bench: Bench) -> None:
    """Print a benchmark: one table per point, then what follows from it."""
    out = wide_console()
    for point in bench.points:
        if point.skipped:
            out.print(point_line(point), highlight=False)
            continue
        mode = "" if point.mode == "eager" else f", {point.mode}"
        title = f"{point.where}, {point.cache} cache{mode}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for model in point.models:
            table.add_column(f"{model.name} ({model.heads} of {model.query_heads})", justify="right")
        for label, cells in _rows(point.models):
            table.add_row(label, *cells)
        out.print(table)
        out.print()
    for capacity in bench.capacities:
        out.print(
            f"{capacity.name}: {capacity.sequences} sequences of {_tokens(capacity)} fit beside the weights in "
            f"{size(capacity.memory_bytes)}",
            highlight=False,
        )
    for each in bench.throughputs:
        out.print(throughput_line(each), highlight=False)
    for line in conclusions(bench):
        out.print(f"- {line}", highlight=False)
    where = f"{bench.engine_version}; bytes of the cache {bench.cache_source}; " if bench.engine else ""
    out.print(
        f"{where}{bench.dtype} on {bench.device}; memory read at {bench.bandwidth / 1e9:.1f} GB/s (measured); medians "
        f"with quartiles of {bench.rounds} interleaved rounds of {bench.steps} tokens.",
        highlight=False,
        style="dim",
    )


def throughput_line(each: Throughput) -> str:
    """What fixed memory for the cache serves."""
    if each.skipped:
        return f"{size(each.memory_bytes)} of cache, {each.context} tokens each: left out, {each.skipped}"
    held = f"{each.requests} requests of {each.context} tokens"
    fits = f"{each.name}: {held} at a time in {size(each.memory_bytes)} of cache"
    if each.seconds is None or each.tokens_per_second is None:
        return fits
    run = "" if each.run == each.requests else f" ({each.run} run)"
    return f"{fits}{run}: {each.tokens_per_second:,.1f} tokens per second, {milliseconds(each.seconds)} a step"


def _tokens(capacity: Capacity) -> str:
    read = "" if capacity.source_tokens is None else f" behind {capacity.source_tokens} of the encoder's"
    return f"{capacity.context} tokens{read}"


def _rows(models: tuple[DecodeResult, ...]) -> list[tuple[str, list[str]]]:
    rows = [
        ("time per token", [milliseconds(m.seconds) for m in models]),
        ("of the base", [times(m.time_ratio) for m in models]),
        ("tokens per second", [f"{m.tokens_per_second:,.1f}" for m in models]),
        ("cache, measured", [f"{size(m.cache_bytes)} (x {m.cache_ratio:.4g})" for m in models]),
        *_parts(models),
        ("floor by bandwidth", [f"{m.floor_seconds * 1e3:.3g} ms ({m.floor_share:.0%} of the time)" for m in models]),
        ("floor, of the base", [f"x {m.floor_ratio:.2f}" for m in models]),
        ("peak memory", ["unknown" if m.peak_bytes is None else size(m.peak_bytes) for m in models]),
    ]
    if models[0].prefill_seconds is not None:
        rows.append(("prefill", [milliseconds(m.prefill_seconds) for m in models if m.prefill_seconds]))
        rows.append(("of the base", [times(m.prefill_ratio) for m in models]))
    rows.append(("verdict", [m.verdict for m in models]))
    return rows


def _parts(models: tuple[DecodeResult, ...]) -> list[tuple[str, list[str]]]:
    """The two caches of a model with an encoder, apart."""
    if not any(model.cross_cache_bytes for model in models):
        return []
    return [
        ("  own attention", [size(m.self_cache_bytes) for m in models]),
        ("  cross-attention", [size(m.cross_cache_bytes) for m in models]),
    ]
