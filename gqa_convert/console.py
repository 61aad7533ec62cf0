"""What the commands print, with rich: tables for people, a progress bar, one line a minute off a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from gqa_convert.conversion import ConvertResult
    from gqa_convert.families import Family
    from gqa_convert.heads import HeadLayout
    from gqa_convert.inspection import Inspection
    from gqa_convert.merge.registry import MergeMethod
    from gqa_convert.planning import ConvertPlan

_SECONDS_BETWEEN_LINES = 60.0
_UNWRAPPED = 10_000


def console() -> Console:
    """The console for results; where it is no terminal nothing is wrapped, so that paths and lines stay whole."""
    return Console() if sys.stdout.isatty() else Console(soft_wrap=True, width=_UNWRAPPED)


def size(count: int) -> str:
    """Bytes with a unit: `size(1536)` is `1.5 KiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{int(amount)} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def layout(heads: HeadLayout) -> str:
    """A head layout in words: `MHA (32 query heads, 32 KV heads of 128)`."""
    return f"{heads.kind} ({heads.num_query_heads} query heads, {heads.num_kv_heads} KV heads of {heads.head_dim})"


def _table(rows: Sequence[tuple[str, str]], title: str = "") -> Table:
    table = Table(show_header=False, box=None, title=title or None, title_justify="left", pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _cache(before: int, after: int) -> str:
    if not before:
        return "unknown"
    return f"{size(before)} -> {size(after)} per token ({after / before:.3g} of the source)"


def recipe_words(made: ConvertPlan) -> str:
    """The recipe in words: `pca of searched groups, calibrated on self, folded, refitted`."""
    recipe = made.recipe
    words = recipe.method + (" of searched groups" if recipe.grouping == "search" else "")
    if recipe.calibrate is not None:
        words += f", calibrated on {recipe.calibrate} ({recipe.sequences} x {recipe.length} tokens)"
    if recipe.fold:
        words += ", folded" + (f" for {recipe.max_context} tokens" if recipe.max_context else "")
    if recipe.refit:
        words += ", refitted" + (f" in {recipe.refit_steps} steps" if recipe.refit_steps else " by least squares")
    return words


def plan_rows(made: ConvertPlan) -> list[tuple[str, str]]:
    """The plan as label and value, for a table."""
    rows = [
        ("source", str(made.source)),
        ("target", str(made.target)),
        ("model", f"{made.model_type} ({made.class_name})"),
        *([("becomes", made.becomes)] if made.becomes else []),
        (
            "heads",
            f"{layout(made.layout_before)} -> {layout(made.layout_after)}"
            + (f"; {made.cross_groups} KV heads in cross-attention" if made.cross_groups else ""),
        ),
        ("method", recipe_words(made)),
        (
            "tensors",
            f"{made.merged_tensors} merged, {made.copied_tensors} copied as they are"
            + (f", {made.rewritten_tensors} rewritten" if made.rewritten_tensors else "")
            + (f", {made.solved_tensors} q, k, v, o tensors solved layer by layer" if made.solved_tensors else "")
            + (f", {made.dropped_tensors} dropped" if made.dropped_tensors else ""),
        ),
        ("config.json", ", ".join(f"{key} = {value}" for key, value in made.config_edits.items()) or "unchanged"),
        ("parameters", f"{made.parameters_in:,} -> {made.parameters_out:,}"),
        ("weights", f"{size(made.bytes_in)} -> {size(made.bytes_out)}"),
        (
            "KV cache",
            _cache(made.kv_cache_bytes_per_token_before, made.kv_cache_bytes_per_token_after),
        ),
        ("tensor parallel", f"up to {made.max_tensor_parallel} without replicating KV heads"),
        ("working memory", f"{size(made.working_bytes)} at most beyond the libraries'"),
    ]
    return rows + [("note", note) for note in made.notes]


def show_plan(made: ConvertPlan) -> None:
    """Print a plan."""
    console().print(_table(plan_rows(made)))


def show_result(result: ConvertResult) -> None:
    """Print what a conversion did."""
    out = console()
    out.print(_table([row for row in plan_rows(result.plan) if row[0] not in ("target", "working memory")]))
    checked = result.checks
    if checked:
        logits = ""
        if "logit_difference" in checked:
            logits = f"; logits within {checked['logit_difference']:.2g} of the source with merged heads"
        filled = type(result.plan.anatomy.target_model).__name__
        out.print(f"verified: {checked['tensors']} tensors fill the {filled} of config.json{logits}")
    out.print(f"[bold green]wrote[/] {result.out}", highlight=False)


def show_inspection(found: Inspection) -> None:
    """Print what a checkpoint is."""
    rows = [
        ("model", f"{found.model_type} ({found.class_name})"),
        *([("becomes", found.becomes)] if found.becomes else []),
        ("heads", layout(found.layout)),
        ("parameters", f"{found.parameters:,}"),
        ("weights", size(found.bytes)),
        ("legal groups", ", ".join(map(str, found.legal_groups))),
    ]
    rows += [
        (f"KV cache, {groups} groups", f"{size(cost)} per token" if cost is not None else f"refused: {reason}")
        for groups, cost, reason in found.cache
    ]
    if found.slow:
        rows.append(
            ("note", "fewer groups make the KV cache smaller but decoding no faster: convert with --allow-slow")
        )
    if found.converted_from:
        rows.append(("converted", f"by {found.converted_from}"))
    console().print(_table(rows))


def show_checks(folder: Path, checks: Mapping[str, Any]) -> None:
    """Print what verifying a pair found."""
    rows = [(key.replace("_", " "), str(value)) for key, value in checks.items() if key != "differing"]
    differing = list(checks.get("differing", ()))
    if differing:
        rows.append(("differing", f"{len(differing)} tensors (trained further?), first {differing[0]}"))
    console().print(_table(rows, title=f"{folder}"))


def show_families(found: Sequence[Family]) -> None:
    """Print model types with their class and reason."""
    table = Table("model type", "class", "converts", "why", box=None, pad_edge=False)
    for family in found:
        table.add_row(family.model_type, family.kind, family.status, family.reason)
    out = console()
    out.print(table)
    counts: dict[str, int] = {}
    for family in found:
        counts[family.status] = counts.get(family.status, 0) + 1
    out.print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))


def show_methods(found: Sequence[MergeMethod]) -> None:
    """Print the merge methods."""
    table = Table("method", "what", "source", box=None, pad_edge=False)
    for method in found:
        table.add_row(method.name, method.title, method.reference)
    console().print(table)


OnBytes = Callable[[int], None]
OnLayer = Callable[[str, int, int], None]


@contextmanager
def conversion_progress(total_bytes: int, *, quiet: bool) -> Iterator[tuple[OnBytes, OnLayer]]:
    """Show layers solved and bytes written: bars on a terminal, a line a minute elsewhere, nothing if `quiet`.

    Yields:
        A function to call with bytes written since its last call, and one to call with what is being done, the number
        of layers finished and of all layers.
    """
    if quiet:
        yield lambda count: None, lambda what, done, total: None
        return
    err = Console(stderr=True)
    if not err.is_terminal:
        yield _lines(err, total_bytes)
        return
    layers = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    written = Progress(
        TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )
    solve_task = layers.add_task("solving layers", total=None, visible=False)
    write_task = written.add_task("write", total=total_bytes)

    def on_layer(what: str, done: int, total: int) -> None:
        layers.update(solve_task, description=what, completed=done, total=total, visible=True)

    with Live(Group(layers, written), console=err, transient=True):
        yield lambda count: written.advance(write_task, count), on_layer


def _lines(err: Console, total_bytes: int) -> tuple[OnBytes, OnLayer]:
    state = {"bytes": 0.0, "last": time.monotonic()}

    def due() -> bool:
        if time.monotonic() - state["last"] < _SECONDS_BETWEEN_LINES:
            return False
        state["last"] = time.monotonic()
        return True

    def on_bytes(count: int) -> None:
        state["bytes"] += count
        if due():
            err.print(f"written {size(int(state['bytes']))} of {size(total_bytes)}")

    def on_layer(what: str, done: int, total: int) -> None:
        if due() or done == total:
            err.print(f"{what}: {done} of {total} layers")

    return on_bytes, on_layer
