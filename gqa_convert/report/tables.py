"""Tables of the page, as HTML. Every value that came from outside is escaped. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from gqa_convert.console import size
from gqa_convert.evaluate.decode.results import lengths
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.report.collect import Run


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", best: int | None = None) -> str:
    """An HTML table in a box that scrolls by itself; cells are HTML already."""
    lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
    lines.append("<thead><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr></thead><tbody>")
    for number, row in enumerate(rows):
        mark = ' class="best"' if number == best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return '<div class="scroll"><table>' + "".join(lines) + "</tbody></table></div>"


def points_table(run: Run) -> str:
    """Every point of a sweep, the original first and the chosen one marked."""
    base = run.base["base"]
    rows = [_base_row(base)]
    rows += [_point_row(point, base) for point in run.points]
    names = [point.name for point in run.points]
    best = names.index(run.recommended.name) + 1 if run.recommended else None
    head = ("", "KV heads", "loss", "loss rise [95 %]", "KL", "top-1", "cache/token (of original)", "decode time")
    return table(head, rows, best=best) + failures(run)


def _base_row(base: dict[str, Any]) -> list[str]:
    return [
        f"{escape(base['name'])} (original)",
        str(base["kv_heads"]),
        f"{base['loss']:.4f}",
        "",
        "",
        "",
        size(base["kv_cache_bytes_per_token"]),
        "1",
    ]


def _point_row(point: SweepPoint, base: dict[str, Any]) -> list[str]:
    if point.status != "done" or point.interval is None or point.cache_bytes_per_token is None:
        return [escape(point.name), str(point.groups), '<span class="bad">failed</span>', *[""] * 5]
    loss = base["loss"] + (point.loss_difference or 0.0)
    return [
        escape(point.name),
        str(point.groups),
        f"{loss:.4f}",
        f"{point.loss_difference:+.4f} [{point.interval[0]:+.4f}, {point.interval[1]:+.4f}]",
        f"{point.kl:.4f}",
        f"{point.top1_agreement:.1%}",
        f"{size(point.cache_bytes_per_token)} ({point.cache_ratio:.3g})",
        "" if point.time_ratio is None else f"{point.time_ratio:.2f}",
    ]


def failures(run: Run) -> str:
    """Why points failed."""
    failed = [point for point in run.points if point.status == "failed"]
    if not failed:
        return ""
    items = "".join(f"<li>{escape(point.name)}: {escape(point.error)}</li>" for point in failed)
    return f'<p class="bad">Failed, the others went on:</p><ul>{items}</ul>'


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """One `gqa eval`."""
    rows = [
        [
            f"{escape(evaluation['base']['name'])} (original)",
            str(evaluation["base"]["kv_heads"]),
            f"{evaluation['base']['loss']:.4f}",
            f"{evaluation['base']['perplexity']:.2f}",
            *[""] * 3,
            size(evaluation["base"]["kv_cache_bytes_per_token"]),
        ]
    ]
    for made in evaluation["converted"]:
        low, high = made["loss_difference_interval"]
        model = made["model"]
        rows.append(
            [
                escape(model["name"]),
                str(model["kv_heads"]),
                f"{model['loss']:.4f}",
                f"{model['perplexity']:.2f}",
                f"{made['loss_difference']:+.4f} [{low:+.4f}, {high:+.4f}]",
                f"{made['kl']:.4f}",
                f"{made['top1_agreement']:.1%}",
                size(model["kv_cache_bytes_per_token"]),
            ]
        )
    head = ("", "KV heads", "loss", "perplexity", "loss rise [95 %]", "KL", "top-1", "cache/token")
    return table(head, rows) + measured_on(evaluation) + tasks_table(evaluation.get("tasks", {}))


def tasks_table(tasks: dict[str, Any]) -> str:
    """Results of lm-eval, a row a task and metric, a column a model."""
    names = list(tasks)
    keys = dict.fromkeys(
        (task, key) for scores in tasks.values() for task, metrics in scores.items() for key in metrics
    )
    rows = [
        [escape(f"{task}, {key}"), *(_number(tasks[name].get(task, {}).get(key)) for name in names)]
        for task, key in keys
    ]
    return table(("task", *names), rows, caption="lm-eval") if rows else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def measured_on(evaluation: dict[str, Any]) -> str:
    """How an evaluation was measured, in small print."""
    versions = ", ".join(f"{name} {version}" for name, version in evaluation["versions"].items())
    return (
        f'<p class="soft">{escape(evaluation["task"])} on {escape(evaluation["data"])}: {evaluation["tokens"]:,} '
        f"tokens ({size(evaluation['bytes'])} of text) in {evaluation['windows']:,} windows of "
        f"{evaluation['context']}, one every {evaluation['stride']}; {escape(evaluation['dtype'])} on "
        f"{escape(evaluation['device'])}; {escape(versions)}. Loss and KL in nats per token, KL(original || "
        "converted); intervals: bootstrap by window, paired; top-1: both models rank the same token first.</p>"
    )


def bench_table(bench: dict[str, Any]) -> str:
    """One decode benchmark: a row a point and model, then what follows from it."""
    rows = []
    for point in bench["points"]:
        source = point.get("source_tokens")
        where = f"{point['cache']}, batch {point['batch']}, {lengths(point['context'], source)}"
        if point["skipped"]:
            rows.append([escape(where), "", f"left out: {escape(point['skipped'])}", *[""] * 6])
        rows += [_bench_row(where, model) for model in point["models"]]
    head = ("cache", "model", "ms/token", "of original", "tokens/s", "cache held", "near floor", "peak", "")
    lines = "".join(f"<li>{escape(line)}</li>" for line in bench["conclusions"])
    note = (
        f'<p class="soft">{escape(bench["dtype"])} on {escape(bench["device"])}; medians of {bench["rounds"]} '
        f"interleaved rounds of {bench['steps']} tokens, quartiles in brackets; memory read at "
        f"{bench['bandwidth'] / 1e9:.1f} GB/s. "
        "Near floor: time that reading weights and cache alone would take, over the time taken.</p>"
    )
    return table(head, rows) + f"<ul>{lines}</ul>" + note


def _bench_row(where: str, model: dict[str, Any]) -> list[str]:
    ratio = model["time_ratio"]
    tone = {"faster": "good", "slower": "bad"}.get(model["verdict"], "")
    return [
        escape(where),
        f"{escape(model['name'])} ({model['kv_heads']})",
        f"{model['seconds']['median'] * 1e3:.3g}",
        "" if ratio is None else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
        f"{model['tokens_per_second']:,.0f}",
        f"{size(model['cache_bytes'])} ({model['cache_ratio']:.3g})",
        f"{model['floor_share']:.0%}",
        "unknown" if model["peak_bytes"] is None else size(model["peak_bytes"]),
        f'<span class="{tone}">{escape(model["verdict"])}</span>',
    ]
