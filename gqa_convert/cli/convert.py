"""`gqa convert` (which is `gqa-convert`) and `gqa plan`: thin, and free of heavy imports until one of them runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gqa_convert.cli import show_conversion
from gqa_convert.cli.heal import HEAL, convert_healed, heal_options
from gqa_convert.cli.options import (
    AllowSlow,
    AnyGroups,
    AsJson,
    Calibrate,
    ComputeDtype,
    CrossGroups,
    Device,
    DryRun,
    Force,
    Grouping,
    GroupsPerLayer,
    KeepLayers,
    KVBudget,
    KVCosts,
    Measure,
    MeasuredOn,
    Method,
    MinGroups,
    Model,
    Out,
    Preset,
    Revision,
    Route,
    Seed,
    TensorParallel,
    Trust,
    Verify,
    Version,
)
from gqa_convert.cli.running import emit
from gqa_convert.cli.signals import stopped_by_signals
from gqa_convert.console import note
from gqa_convert.conversion.head_plan import asked_groups
from gqa_convert.conversion.recipe import make_recipe
from gqa_convert.errors import check_choice
from gqa_convert.progress import conversion_progress

if TYPE_CHECKING:
    from gqa_convert.conversion.plan import ConvertPlan


def convert_command(
    model: Model,
    groups: AnyGroups = None,
    groups_per_layer: GroupsPerLayer = None,
    kv_budget: KVBudget = None,
    kv_costs: KVCosts = "measured",
    keep_layers: KeepLayers = "",
    tp: TensorParallel = 1,
    min_groups: MinGroups = 1,
    cross_groups: CrossGroups = None,
    out: Out = None,
    preset: Preset = None,
    method: Method = None,
    grouping: Grouping = None,
    calibrate: Calibrate = None,
    calibration_sequences: Annotated[int | None, typer.Option(help="Calibration sequences. (default: 128)")] = None,
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens of each, at most the model's context. (default: 2048)")
    ] = None,
    fold: Annotated[
        bool | None, typer.Option("--fold/--no-fold", help="pca: let rotary pairs that hardly turn share freely.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Longest context that --fold keeps sound. (default: the config's)")
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Fit each layer to the original's attention output.")
    ] = None,
    refit_steps: Annotated[
        int | None, typer.Option(help="Gradient steps per layer; 0: least squares of o_proj alone. (default: 300)")
    ] = None,
    refit_tokens: Annotated[int | None, typer.Option(help="Tokens of each step. (default: 2048)")] = None,
    refit_lr: Annotated[float | None, typer.Option(help="Peak learning rate. (default: by width)")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep solved layers here, to resume or reuse. (default: beside --out, removed)")
    ] = None,
    heal_tokens: Annotated[
        str | None,
        typer.Option(help="--preset heal: tokens to train on at most. (default: 500k)", metavar="COUNT"),
    ] = None,
    heal_until: Annotated[
        float | None,
        typer.Option(
            help="--preset heal: stop once the held-out loss is within so many nats per token of the original's.",
            metavar="NATS",
        ),
    ] = None,
    flush: Annotated[
        bool, typer.Option("--flush/--no-flush", help="Wait for the disk; without, a power cut may harm the output.")
    ] = True,
    seed: Seed = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    force: Force = False,
    route: Route = "auto",
    allow_slow: AllowSlow = False,
    verify: Verify = "structure",
    measure: Measure = None,
    data: MeasuredOn = None,
    device: Device = "auto",
    dtype: ComputeDtype = "auto",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    version: Version = False,
) -> None:
    """Convert a checkpoint to grouped-query attention with GROUPS KV heads, or another number in each layer.

    More groups are closer to the source; fewer are smaller and faster to decode. The source is never written to, and
    the output appears whole or not at all.
    """
    recipe = make_recipe(
        "best" if preset == HEAL else preset,
        method=method,
        grouping=grouping,
        calibrate=calibrate,
        sequences=calibration_sequences,
        length=calibration_length,
        fold=fold,
        max_context=max_context,
        refit=refit,
        refit_steps=refit_steps,
        refit_tokens=refit_tokens,
        refit_lr=refit_lr,
        seed=seed,
    )
    healing = heal_options(preset, calibrate, heal_tokens, heal_until, seed)
    check_choice("--kv-costs", kv_costs, ("measured", "estimated"))
    asked = asked_groups(groups, groups_per_layer, kv_budget)
    from gqa_convert.conversion import execute, plan
    from gqa_convert.conversion.forecast import forecast

    shared: dict[str, Any] = {
        "cross_groups": cross_groups,
        "keep_layers": keep_layers,
        "tensor_parallel": tp,
        "min_groups": min_groups,
        "out": out,
        "recipe": recipe,
        "route": route,
        "allow_slow": allow_slow,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    if asked is None:
        from gqa_convert.evaluate.kv_budget import plan_within

        with stopped_by_signals(), conversion_progress(0, quiet=json) as (_, on_layer):
            planned = plan_within(
                model, budget=kv_budget or "", data=data, work=work, costs_by=kv_costs, on_layer=on_layer, **shared
            )
    else:
        planned = plan.plan(model, groups=asked, **shared)
    if dry_run:
        _emit_plan(planned, json)
        _clear_work(planned, work)
        return
    cost = forecast(planned)
    if cost is not None and not json:
        note(f"solving attention blocks: {show_conversion.solving_words(cost)}")
    if healing is not None:
        convert_healed(
            planned,
            healing,
            work=work,
            force=force,
            flush=flush,
            verify=verify,
            trust_remote_code=trust_remote_code,
            json=json,
        )
        return
    with stopped_by_signals(), conversion_progress(planned.bytes_out, quiet=json) as (on_bytes, on_layer):
        result = execute.execute(
            planned,
            verify=verify,
            force=force,
            work=work,
            flush=flush,
            device=device,
            dtype=dtype,
            on_bytes=on_bytes,
            on_layer=on_layer,
        )
    _clear_work(planned, work)
    quality = None
    if measure is not False:
        from gqa_convert.evaluate.quality import recorded_quality

        insist = bool(measure) or data is not None
        result, quality = recorded_quality(result, data=data, insist=insist, device=device)
    emit(result.to_json(), json, lambda: show_conversion.show_result(result, quality))


def _clear_work(planned: ConvertPlan, work: Path | None) -> None:
    """Remove what choosing heads within a budget left beside the output, if it is not the user's to keep."""
    from gqa_convert.conversion.solve import work_folder

    if planned.allocation is not None:
        with suppress(OSError), work_folder(planned, work):
            pass


def plan_command(
    model: Model,
    groups: AnyGroups = None,
    groups_per_layer: GroupsPerLayer = None,
    keep_layers: KeepLayers = "",
    tp: TensorParallel = 1,
    min_groups: MinGroups = 1,
    cross_groups: CrossGroups = None,
    out: Out = None,
    preset: Preset = None,
    method: Method = None,
    route: Route = "auto",
    allow_slow: AllowSlow = False,
    json: AsJson = False,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Print what converting would read, merge, edit and write. `gqa convert --dry-run` takes every option."""
    from gqa_convert.conversion import plan

    recipe = make_recipe("best" if preset == HEAL else preset, method=method)
    planned = plan.plan(
        model,
        groups=asked_groups(groups, groups_per_layer) or 0,
        cross_groups=cross_groups,
        keep_layers=keep_layers,
        tensor_parallel=tp,
        min_groups=min_groups,
        out=out,
        recipe=recipe,
        route=route,
        allow_slow=allow_slow,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    _emit_plan(planned, json)


def _emit_plan(planned: ConvertPlan, json: bool) -> None:
    from gqa_convert.conversion.forecast import forecast

    cost = forecast(planned)
    described = planned.to_json() | {"forecast": None if cost is None else asdict(cost)}
    emit(described, json, lambda: show_conversion.show_plan(planned, cost))
