"""Plans, results, inspections, families and methods on a terminal. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from gqa_convert.calibrate.report import poor_blocks_line
from gqa_convert.console import console, duration, key_value_table, show_written, size

if TYPE_CHECKING:
    from gqa_convert.anatomy.families import Family
    from gqa_convert.conversion.execute import ConvertResult
    from gqa_convert.conversion.forecast import Forecast
    from gqa_convert.conversion.inspect import Inspection
    from gqa_convert.conversion.plan import ConvertPlan
    from gqa_convert.conversion.recipe import Recipe
    from gqa_convert.evaluate.quality import Quality
    from gqa_convert.heads import HeadLayout
    from gqa_convert.merge.registry import MergeMethod


def layout(heads: HeadLayout) -> str:
    """A head layout in words: `MHA (32 query heads, 32 KV heads of 128)`."""
    kv_heads = f"{heads.kv_heads_words} KV head{'' if heads.kv_heads_words == '1' else 's'}"
    return f"{heads.kind} ({heads.num_query_heads} query heads, {kv_heads} of {heads.head_dim})"


def per_layer(heads: HeadLayout) -> str:
    """The KV heads of each layer, runs of equal ones together: `8 x 2, 4, 2 x 3`."""
    runs = [(count, len(list(same))) for count, same in itertools.groupby(heads.per_layer)]
    return ", ".join(f"{count} x {layers}" if layers > 1 else str(count) for count, layers in runs)


def _chosen(found: Mapping[str, Any]) -> str:
    """How the heads of each layer were chosen, in words."""
    measured = found["measured"]
    return (
        f"within {size(found['budget'])} per token by what each layer costs alone: divergence "
        f"{found['predicted_kl']:.3f} predicted, {measured['kl']:.3f} measured ({measured['loss']:+.3f} nats per "
        f"token) on {found['tokens']} tokens"
    )


def _edit(key: str, value: object) -> str:
    """One change of config.json; what fills pages is named alone."""
    text = f"{key} = {value}"
    return text if len(text) <= 400 else f"{key} = ..."


def _cache(before: int, after: int) -> str:
    if not before:
        return "unknown"
    return f"{size(before)} -> {size(after)} per token ({after / before:.3g} of the source)"


def recipe_words(planned: ConvertPlan) -> str:
    """The recipe in words: `pca of searched groups, calibrated on self, folded, refitted`."""
    recipe = planned.recipe
    words = recipe.method + (" of searched groups" if recipe.grouping == "search" else "")
    if recipe.calibrate is not None:
        words += f", calibrated on {recipe.calibrate} ({_calibration_size(planned)})"
    if recipe.fold:
        words += ", folded" + (f" for {recipe.max_context} tokens" if recipe.max_context else "")
    if recipe.refit:
        words += ", refitted" + (f" in {recipe.refit_steps} steps" if recipe.refit_steps else " by least squares")
    return words


def _calibration_size(planned: ConvertPlan) -> str:
    from gqa_convert.calibrate.inputs import listens, sound_seconds, sound_windows

    recipe = planned.recipe
    if not listens(planned.anatomy.source):
        return f"{recipe.sequences} x {recipe.length} tokens"
    windows = sound_windows(recipe, planned.anatomy.config)
    return f"up to {windows} windows of {sound_seconds(planned.anatomy.config):g} s"


def usual_loss(recipe: Recipe) -> str:
    """What a recipe of this kind has cost where it was measured (docs/merging.md), in words."""
    if not recipe.uses_blocks:
        return "usually not usable before uptraining: +1 to +7 nats per token where it was measured"
    if not recipe.refit:
        return "+0.1 to +1.4 nats per token where it was measured; uptrain afterwards"
    return "0 to +0.8 nats per token where it was measured; the end says what it was"


def solving_words(cost: Forecast) -> str:
    """What solving will take, in words."""
    return f"about {duration(cost.seconds)} and {size(cost.memory_bytes)} on this machine"


def _devices(most: int) -> str:
    if most == 1:
        return "KV heads are copied to every device"
    return f"up to {most} devices without replicating KV heads"


def plan_rows(planned: ConvertPlan, cost: Forecast | None = None) -> list[tuple[str, str]]:
    """The plan as label and value, for a table; with what solving it will take, where that was estimated."""
    rows = [
        ("source", str(planned.source)),
        ("target", str(planned.target)),
        ("model", f"{planned.model_type} ({planned.class_name})"),
        *([("becomes", planned.becomes)] if planned.becomes else []),
        (
            "heads",
            f"{layout(planned.layout_before)} -> {layout(planned.layout_after)}"
            + (f"; {planned.cross_groups} KV heads in cross-attention" if planned.cross_groups else ""),
        ),
        *([("KV heads by layer", per_layer(planned.layout_after))] if planned.layout_after.per_layer else []),
        *([("chosen", _chosen(planned.allocation))] if planned.allocation else []),
        ("method", recipe_words(planned)),
        (
            "tensors",
            f"{planned.merged_tensors} merged, {planned.copied_tensors} copied as they are"
            + (f", {planned.rewritten_tensors} rewritten" if planned.rewritten_tensors else "")
            + (f", {planned.solved_tensors} q, k, v, o tensors solved layer by layer" if planned.solved_tensors else "")
            + (f", {planned.dropped_tensors} dropped" if planned.dropped_tensors else ""),
        ),
        ("config.json", ", ".join(_edit(key, value) for key, value in planned.config_edits.items()) or "unchanged"),
        ("parameters", f"{planned.parameters_in:,} -> {planned.parameters_out:,}"),
        ("weights", f"{size(planned.bytes_in)} -> {size(planned.bytes_out)}"),
        (
            "KV cache",
            _cache(planned.kv_cache_bytes_per_token_before, planned.kv_cache_bytes_per_token_after),
        ),
        ("tensor parallel", _devices(planned.max_tensor_parallel)),
        *([("solving", solving_words(cost))] if cost is not None else []),
        *([("usual loss", usual_loss(planned.recipe))] if planned.merges_heads else []),
        ("working memory", f"{size(planned.working_bytes)} at most beyond the libraries'"),
    ]
    rows += [("where it runs", line) for line in planned.where_it_runs]
    return rows + [("note", note) for note in planned.notes]


def show_plan(planned: ConvertPlan, cost: Forecast | None = None) -> None:
    """Print a plan."""
    console().print(key_value_table(plan_rows(planned, cost)))


def show_result(result: ConvertResult, quality: Quality | None = None) -> None:
    """Print what a conversion did, what it cost where that was measured, and what to do next."""
    out = console()
    out.print(
        key_value_table(
            [row for row in plan_rows(result.plan) if row[0] not in ("target", "working memory", "usual loss")]
        )
    )
    checked = result.checks
    if checked:
        logits = ""
        if "logit_difference" in checked:
            logits = f"; logits within {checked['logit_difference']:.2g} of the source with merged heads"
        filled = type(result.plan.anatomy.target_model).__name__
        out.print(f"verified: {checked['tensors']} tensors fill the {filled} of config.json{logits}")
    show_written(out, result.out)
    poor = poor_blocks_line(result.blocks)
    for line in (*([poor] if poor else []), *quality_lines(result, quality)):
        out.print(line, highlight=False, markup=False)


def _measuring(result: ConvertResult) -> str:
    from gqa_convert.calibrate.inputs import listens

    data = "SOUND" if listens(result.plan.anatomy.source) else "TEXT"
    return f"gqa eval {result.plan.source} {result.out} --data {data}"


def quality_lines(result: ConvertResult, quality: Quality | None) -> list[str]:
    """What a conversion cost in words, and the next command where one is needed."""
    if quality is None:
        return ["quality: not measured. See what it cost: " + _measuring(result)]
    if quality.rise is None:
        lines = [f"quality: {quality.verdict}."]
        if quality.reason != "nothing was merged":
            lines.append(f"next: {_measuring(result)}")
        return lines
    before, after = (math.exp(min(loss, 700.0)) for loss in (quality.loss_before or 0.0, quality.loss_after or 0.0))
    lines = [
        f"quality: perplexity {before:.4g} -> {after:.4g} ({quality.rise:+.3f} nats per token, same first choice "
        f"{quality.agreement or 0.0:.0%}) on {quality.tokens} tokens of {quality.sample}: {quality.verdict}."
    ]
    if not quality.usable:
        heal = f"gqa heal {result.out} {result.plan.source} --text TEXT --out {result.out}-healed (hours)"
        if not result.plan.recipe.refit:
            heal = "gqa-convert --preset best --calibrate TEXT (minutes to hours), then gqa heal (hours)"
        lines.append(f"next: {heal}, or gqa uptrain (configs/ has documented runs).")
    return lines


def show_inspection(inspection: Inspection) -> None:
    """Print what a checkpoint is."""
    rows = [
        ("model", f"{inspection.model_type} ({inspection.class_name})"),
        *([("becomes", inspection.becomes)] if inspection.becomes else []),
        ("heads", layout(inspection.layout)),
        *([("KV heads by layer", per_layer(inspection.layout))] if inspection.layout.per_layer else []),
        ("parameters", f"{inspection.parameters:,}"),
        ("weights", size(inspection.bytes)),
        ("legal groups", ", ".join(map(str, inspection.legal_groups))),
    ]
    rows += [
        (
            f"KV cache, {groups} group{'' if groups == 1 else 's'}",
            f"{size(cost)} per token" if cost is not None else f"refused: {reason}",
        )
        for groups, cost, reason in inspection.cache
    ]
    rows += [("note", note) for note in inspection.notes]
    if inspection.slow:
        rows.append(
            ("note", "fewer groups make the KV cache smaller but decoding no faster: convert with --allow-slow")
        )
    if inspection.converted_from:
        rows.append(("converted", f"by {inspection.converted_from}"))
    console().print(key_value_table(rows))


def show_checks(folder: Path, checks: Mapping[str, Any]) -> None:
    """Print what verifying a pair found."""
    labels = {
        "identical": "copied byte for byte",
        "rewritten": "rewritten for the family",
        "merged": "heads merged",
        "solved": "solved by block",
        "trained": "trained since",
        "recomputed": "equal when computed again",
        "recorded_hash": "equal to the recorded hash",
        "unproven": "finite, no hash recorded",
    }
    rows = [
        (labels.get(key, key.replace("_", " ")), str(value))
        for key, value in checks.items()
        if key != "differing" and (value or key not in labels)
    ]
    differing = list(checks.get("differing", ()))
    if differing:
        rows.append(("differing", f"{len(differing)} tensors (trained further? no record), first {differing[0]}"))
    console().print(key_value_table(rows, title=f"{folder}"))


def show_families(listed: Sequence[Family]) -> None:
    """Print model types with their class and reason."""
    table = Table("model type", "class", "converts", "why", box=None, pad_edge=False)
    for family in listed:
        table.add_row(family.model_type, family.kind, family.status, family.reason)
    out = console()
    out.print(table)
    counts: dict[str, int] = {}
    for family in listed:
        counts[family.status] = counts.get(family.status, 0) + 1
    out.print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))


def show_methods(methods: Sequence[MergeMethod]) -> None:
    """Print the merge methods."""
    table = Table("method", "what", "source", box=None, pad_edge=False)
    for method in methods:
        table.add_row(method.name, method.title, method.reference)
    console().print(table)
