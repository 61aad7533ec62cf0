"""The model card of a converted folder: README.md with the hub's metadata. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_convert.checkpoint.ownership import CARD, SOURCE_CARD, is_signed, sign_card
from gqa_convert.conversion.card import (
    as_object,
    configuration,
    loading,
    made_by,
    metadata,
    plain,
    read_card,
    recipe_line,
    task,
    versions_line,
    where,
)
from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.files import read_json
from gqa_convert.evaluate.results import Evaluation, ModelResult
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.report.collect import Detail, Run

if TYPE_CHECKING:
    from typing import Any

    from huggingface_hub import EvalResult


def may_write(folder: Path) -> bool:
    """Whether the folder's README.md is missing, ours by its mark, or as the conversion wrote it by its record.

    `gqa_convert.json` lists the files that a conversion wrote with their hashes.
    """
    path = folder / CARD
    if not path.exists() and not path.is_symlink():
        return True
    content = read_card(folder)
    if content is None or path.is_symlink():
        return False
    if is_signed(content):
        return True
    listed = as_object(_record(folder).get("files")).get(CARD)
    return as_object(listed).get("sha256") == hashlib.sha256(content).hexdigest()


def card(run: Run, point: SweepPoint, *, base_model: str = "") -> str:
    """Write the card of one point's model.

    Args:
        run: what was measured.
        point: whose model it is.
        base_model: hub id of the original; by default the one the conversion recorded, if any.
    """
    assert run.base is not None
    folder = run.model_folder(point)
    record = _record(folder)
    source = as_object(record.get("source"))
    base_model = base_model or str(as_object(source.get("hub")).get("repo_id") or "")
    base_name = " ".join((base_model or run.base.base.name).split())
    title = f"{Path(base_name).name}, {point.heads} KV heads"
    detail = run.details[point.name]
    measured = detail.evaluation or run.base
    sections = [
        f"---\n{metadata(folder, base_model, title, _results(folder, point, measured)).to_yaml()}\n---",
        f"# {plain(title)}",
        _opening(run.base.base, point, base_name),
        "## How to load\n\n" + loading(folder),
        "## What it costs and saves\n\n" + _numbers(run.base.base, point, measured, detail),
        "## Where it runs\n\n" + where(record, folder),
        "## How it was made\n\n" + _making(record, detail),
    ]
    if (folder / SOURCE_CARD).is_file():
        sections.append(f"## The original\n\nIts card came along as [{SOURCE_CARD}]({SOURCE_CARD}).")
    return sign_card("\n\n".join(sections))


def _record(folder: Path) -> dict[str, Any]:
    return as_object(read_json(folder / "gqa_convert.json"))


def _results(folder: Path, point: SweepPoint, measured: Evaluation) -> list[EvalResult]:
    """Every metric on the card, for the hub's metadata."""
    from huggingface_hub import EvalResult

    kind = task(configuration(folder))
    return [
        EvalResult(
            task_type=kind,
            dataset_type="text",
            dataset_name=measured.data,
            metric_type=metric.name,
            metric_name=metric.label,
            metric_value=point.figures[metric.name].value,
        )
        for metric in metrics.shown("card", [point.figures])
    ]


def _opening(base: ModelResult, point: SweepPoint, base_name: str) -> str:
    counts = ",".join(map(str, point.groups_per_layer))
    differing = f" Layers differ, first to last: {counts}." if counts else ""
    saved = f" Its KV cache takes {point.cache_ratio:.1%} of the original's memory." if point.cache_ratio else ""
    return (
        f"{plain(base_name)} converted to grouped-query attention: {base.kv_heads} KV heads became {point.heads}, "
        f"shared by {base.query_heads} query heads.{differing}{saved} It is stored as transformers stores models."
    )


def _numbers(base: ModelResult, point: SweepPoint, measured: Evaluation, detail: Detail) -> str:
    shown = metrics.shown("card", [point.figures])
    lines = ["| | original | this model |", "|---|---|---|", f"| KV heads | {base.kv_heads} | {point.heads} |"]
    for metric in (metric for metric in shown if metric.of == "model"):
        cells = (metric.cell(figures.get(metric.name)) for figures in (base.figures, point.figures))
        unit = f", {metric.unit}" if metric.unit else ""
        lines.append(f"| {metric.label}{unit} | {' | '.join(cells)} |")
    pair = [metric for metric in shown if metric.of == "pair"]
    lines += ["", "| beside the original | |", "|---|---|"] if pair else []
    lines += [f"| {metric.label} | {metric.cell(point.figures[metric.name])} |" for metric in pair]
    lines.append(
        f"\nOn {plain(measured.data)}, {measured.tokens:,} tokens, {plain(measured.dtype)}. {metrics.legend(shown)}."
    )
    if detail.timed is not None:
        lines += ["", *(f"- {plain(line)}" for line in detail.timed.conclusions)]
        lines.append(f"\nDecoding measured in {plain(detail.timed.bench.dtype)} on {plain(detail.timed.bench.device)}.")
    return "\n".join(lines)


def _making(record: dict[str, Any], detail: Detail) -> str:
    lines = [f"Converted with {made_by(record)}: {recipe_line(detail.recipe)}."]
    versions = versions_line(record)
    if versions:
        lines.append(f"Versions: {versions}. `gqa_convert.json` has the whole record.")
    return " ".join(lines)
