"""`gqa budget`: price an uptraining run before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gqa_convert.budget.arithmetic import budget_rows
from gqa_convert.checkpoint.embedded import CHECKPOINT, DEMO
from gqa_convert.cli.options import AsJson
from gqa_convert.cli.running import emit
from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from gqa_convert.budget.arithmetic import Budget
    from gqa_convert.budget.memory import TrainingMemory
    from gqa_convert.budget.shape import ModelShape


def budget_command(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, or a known model's name (--list).", metavar="[MODEL]")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the pretraining tokens (default: 0.05)")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on (2B, 1.5T, ...); wins over --alpha.")] = None,
    steps: Annotated[str | None, typer.Option(help="Steps to train for; wins over --tokens and --alpha.")] = None,
    pretraining: Annotated[str | None, typer.Option(help="Known model whose pretraining budget to take.")] = None,
    pretraining_tokens: Annotated[str | None, typer.Option(help="Tokens of the pretraining.")] = None,
    pretraining_steps: Annotated[str | None, typer.Option(help="Steps of the pretraining, of --batch-tokens.")] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens per step (default: as published, else 2M)")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per sequence (default: the model's)")] = None,
    hardware: Annotated[str, typer.Option(help="Device name (h100, a100, ...) or its TFLOP/s.")] = "h100",
    devices: Annotated[int, typer.Option(help="How many devices.")] = 8,
    mfu: Annotated[float, typer.Option(help="Share of the devices' peak that training reaches.")] = 0.4,
    price: Annotated[
        float | None, typer.Option(help="Price of a device hour, in any currency: costs are shown too.", min=0)
    ] = None,
    distill: Annotated[bool, typer.Option("--distill", help="Add the forward passes of a teacher as large.")] = False,
    engine: Annotated[
        str | None, typer.Option(help="single, ddp, fsdp2, deepspeed, or all: memory of each. (default: by --devices)")
    ] = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences of a forward pass on one device.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="bf16 (float32 weights), float32, pure_bf16.")] = "bf16",
    trains: Annotated[str, typer.Option("--train", help="all, attention or lora: what is trained.")] = "all",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations in the backward pass.")
    ] = True,
    list_known: Annotated[bool, typer.Option("--list", help="List the known pretraining budgets and devices.")] = False,
    json: AsJson = False,
) -> None:
    """Say what uptraining would cost: tokens, steps, FLOPs (attention included), hours, bytes, distillation."""
    from gqa_convert.budget import arithmetic
    from gqa_convert.budget.counts import parse_count
    from gqa_convert.budget.shape import known_model, shape_of_folder
    from gqa_convert.budget.solving import solving, solving_json, solving_rows

    if list_known:
        _list(json)
        return
    if model is None:
        raise UsageError("budget: name a model folder or a known model, or give --list.")
    if model == DEMO and not Path(model).is_dir():
        model = str(CHECKPOINT)
    is_folder = Path(model).is_dir()
    known = (
        known_model(model if pretraining is None else pretraining)
        if (pretraining is not None or not is_folder)
        else None
    )
    shape = shape_of_folder(Path(model)) if is_folder else known_model(model).shape

    def count(text: str | None) -> int | None:
        return None if text is None else parse_count(text)

    published = known.batch_tokens if known else None
    batch = count(batch_tokens) or published or 2_097_152
    before = count(pretraining_tokens)
    if before is None and pretraining_steps is None and known:
        before = known.tokens
    length = arithmetic.horizon(
        batch_tokens=batch,
        steps=count(steps),
        tokens=count(tokens),
        alpha=alpha,
        pretraining_tokens=before,
        pretraining_steps=count(pretraining_steps),
        pretraining_batch_tokens=published,
    )
    plan = arithmetic.budget(
        shape,
        length,
        context=context,
        teacher=shape if distill else None,
        hardware=hardware,
        device_count=devices,
        mfu=mfu,
    )
    presets = solving(shape, hardware=hardware, mfu=mfu)
    counted = _memory(shape, plan, distill, engine, micro_batch, precision, trains, checkpointing)
    if json:
        more: dict[str, Any] = {"source": known.source if known else None}
        more |= {"memory": [memory.to_json() for memory in counted], "presets": solving_json(presets)}
        paid = None if price is None or plan.device_hours is None else plan.device_hours * price
        emit(plan.to_json() | more | {"price_per_device_hour": price, "cost": paid}, True, lambda: None)
        return
    _show(plan, shape, before, known.source if known else None, counted, solving_rows(presets, price), price)


def _memory(
    shape: ModelShape,
    price: Budget,
    distill: bool,
    engine: str | None,
    micro_batch: int,
    precision: str,
    trains: str,
    checkpointing: bool,
) -> list[TrainingMemory]:
    from gqa_convert.budget.memory import ENGINES, TrainingSetup, training_memory

    if trains not in ("all", "attention", "lora"):
        raise UsageError(f"--train {trains}: choose all, attention or lora.")
    usual = "single" if price.device_count == 1 else "fsdp2"
    engines = ENGINES if engine == "all" else (engine or usual,)
    sequences = max(1, price.batch_tokens // (price.context * micro_batch))
    return [
        training_memory(
            shape,
            TrainingSetup(
                engine=name,
                devices=1 if name == "single" else price.device_count,
                context=price.context,
                micro_batch=micro_batch,
                accumulation=max(1, sequences // (1 if name == "single" else price.device_count)),
                precision=precision,
                parameters=trains,
                checkpointing=checkpointing,
            ),
            shape if distill else None,
        )
        for name in engines
    ]


def _show(
    plan: Budget,
    shape: ModelShape,
    before: int | None,
    source: str | None,
    counted: Sequence[TrainingMemory],
    presets: list[tuple[str, str]],
    price: float | None,
) -> None:
    from gqa_convert.budget.memory import memory_rows
    from gqa_convert.budget.shape import devices
    from gqa_convert.console import console, key_value_table

    known = devices().get((plan.hardware or "").lower())
    capacity = None if known is None else int(known["memory_gb"]) * 10**9

    rows = [("model", f"{shape.name}, {shape.parameters:,} parameters")]
    if before is not None:
        rows.append(("pretraining", f"{before:,} tokens" + (f" ({source})" if source else "")))
    more = [row for memory in counted for row in memory_rows(memory, capacity)]
    if price is not None and plan.device_hours is not None:
        more.insert(0, ("cost", f"{plan.device_hours * price:,.2f} at {price:g} per device hour"))
    console().print(key_value_table([*rows, *budget_rows(plan), *more, *presets]))


def _list(json: bool) -> None:
    from rich.table import Table

    from gqa_convert.budget.counts import format_count
    from gqa_convert.budget.shape import devices, known_models
    from gqa_convert.console import console

    models, hardware = known_models(), devices()
    if json:
        described = {
            name: {"tokens": m.tokens, "batch_tokens": m.batch_tokens, "steps": m.steps, "source": m.source}
            for name, m in models.items()
        }
        emit({"models": described, "devices": hardware}, True, lambda: None)
        return
    table = Table("model", "parameters", "tokens", "source", box=None, pad_edge=False)
    for name, m in models.items():
        table.add_row(name, format_count(m.shape.parameters), format_count(m.tokens), m.source)
    console().print(table)
    table = Table("device", "bf16 TFLOP/s", "GB", "source", box=None, pad_edge=False)
    for name, entry in hardware.items():
        table.add_row(name, str(entry["tflops"]), str(entry["memory_gb"]), entry["source"])
    console().print(table)
