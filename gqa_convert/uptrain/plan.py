"""What a configuration amounts to, before a weight is read: length, price, batches, learning rates."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.filling import check_loads
from gqa_convert.budget.arithmetic import Budget, Horizon, budget, budget_rows, horizon
from gqa_convert.budget.counts import format_count
from gqa_convert.budget.memory import TrainingMemory, memory_rows, training_memory
from gqa_convert.budget.shape import ModelShape, known_model, shape_of_folder
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.data.documents import open_corpus
from gqa_convert.data.hub_check import missing_dataset
from gqa_convert.errors import UsageError
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.metrics import chosen_trackers
from gqa_convert.uptrain.optim import get_optimizer
from gqa_convert.uptrain.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class UptrainPlan:
    """A resolved run.

    Attributes:
        config: as given, defaults filled in.
        source: the converted model's folder.
        shape: its sizes.
        horizon: steps and tokens.
        budget: what they cost.
        schedule: the learning rate by tokens.
        teacher: the original's folder, when distilling.
        memory: of each device; None where the model's sizes are not known.
        notes: what could not be found out.
    """

    config: UptrainConfig
    source: Path
    shape: ModelShape
    horizon: Horizon
    budget: Budget
    schedule: Schedule
    teacher: Path | None
    memory: TrainingMemory | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "config": self.config.model_dump(mode="json"),
            "parameters": self.shape.parameters,
            "budget": self.budget.to_json(),
            "notes": list(self.notes),
            "memory": None if self.memory is None else self.memory.to_json(),
            "learning_rates": {str(tokens): rate for tokens, rate in self.rates()},
        }

    def rates(self) -> list[tuple[int, float]]:
        """Learning rates at the first step, after warm-up, half way, and at the end."""
        batch, total = self.horizon.batch_tokens, self.horizon.tokens
        marks = {batch, max(batch, round(self.schedule.warmup_tokens)), total // 2, total}
        return [(mark, self.schedule(mark)) for mark in sorted(marks) if mark]


def resolve(config: UptrainConfig) -> UptrainPlan:
    """Resolve a configuration; reads headers and lists files, no weights and no text.

    Raises:
        UsageError: if the length is not decided, sources are missing, or trackers are not installed.
        CheckpointError: if the model folder is no checkpoint, or its weights do not fill the model.
    """
    source = resolve_model(config.model)
    output, inside = Path(config.output).resolve(), source.resolve()
    if output == inside or output.is_relative_to(inside) or inside.is_relative_to(output):
        raise UsageError(f"output={config.output}: must lie apart from the model folder {config.model}.")
    shape = shape_of_folder(source)
    check_loads(Source.open(source, trust_remote_code=config.trust_remote_code))
    notes = open_corpus_of(config)
    chosen_trackers(config.log)
    length = resolve_horizon(config)
    distillation = config.objective.distillation
    teacher = resolve_model(distillation.teacher) if distillation and not distillation.cache else None
    taught = shape_of_folder(teacher) if teacher else None
    price = budget(
        shape,
        length,
        context=config.data.context,
        teacher=taught,
        state_bytes_per_parameter=get_optimizer(config.optimizer.kind).state_bytes,
    )
    return UptrainPlan(
        config=config,
        source=source,
        shape=shape,
        horizon=length,
        budget=price,
        schedule=Schedule(config.schedule, length.tokens, length.batch_tokens),
        teacher=teacher,
        memory=_memory(config, shape, taught),
        notes=notes,
    )


def _memory(config: UptrainConfig, shape: ModelShape, teacher: ModelShape | None) -> TrainingMemory | None:
    from gqa_convert.uptrain.forecast import training_setup

    processes = config.expect.processes or int(os.environ.get("WORLD_SIZE", "1"))
    if not shape.hidden_size or not shape.vocab_size:
        return None
    reference = config.evaluation.reference
    compared = shape_of_folder(resolve_model(reference)) if reference else None
    return training_memory(shape, training_setup(config, processes=processes), teacher, reference=compared)


def device_memory() -> int | None:
    """Bytes of this machine's device: of its first GPU, else what its memory has free."""
    import torch

    from gqa_convert.budget.machine import free_memory

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return free_memory()


def open_corpus_of(config: UptrainConfig) -> tuple[str, ...]:
    """Make sure that the sources are there; returns what could not be found out about those on the hub."""
    from gqa_convert.uptrain.corpus import source_spec

    sections = [section for _, section, _ in config.data.named]
    sections += [section for section in (config.data.held_out_source, *config.evaluation.sets.values()) if section]
    unknown: list[str | None] = []
    for section in sections:
        if section.kind == "hub":
            unknown.append(missing_dataset(source_spec(section)))
        elif section.kind != "python":
            open_corpus(source_spec(section))
    return tuple(note for note in unknown if note)


def resolve_horizon(config: UptrainConfig) -> Horizon:
    """The run's length. A known model's tokens are used unless the configuration gives a number."""
    settings = config.budget
    known = known_model(settings.pretraining) if settings.pretraining else None
    before = settings.pretraining_tokens
    if before is None and settings.pretraining_steps is None and known:
        before = known.tokens
    return horizon(
        batch_tokens=config.train.batch_sequences * config.data.context,
        steps=settings.steps,
        tokens=settings.tokens,
        alpha=settings.alpha,
        pretraining_tokens=before,
        pretraining_steps=settings.pretraining_steps,
        pretraining_batch_tokens=known.batch_tokens if known else None,
    )


def plan_rows(plan: UptrainPlan) -> list[tuple[str, str]]:
    """The plan as label and value, for a table."""
    config = plan.config
    rows = [
        ("model", f"{config.model} ({plan.shape.parameters:,} parameters)"),
        ("output", config.output),
        *budget_rows(plan.budget),
        *([] if plan.memory is None else memory_rows(plan.memory, device_memory())),
        (
            "batch",
            f"{config.train.batch_sequences:,} sequences of {config.data.context:,} tokens, any number of devices",
        ),
        ("data", _sources(config) + (", streaming" if config.data.streaming else "")),
        (
            "documents",
            "kept apart (positions restart, no attention across)" if config.separate_documents else "packed together",
        ),
        ("held out", _held_out(config)),
        ("objective", _objective(config)),
        ("optimizer", f"{config.optimizer.kind}, clip {config.optimizer.clip}, precision {config.train.precision}"),
        (
            "learning rate",
            f"{config.schedule.kind}: "
            + ", ".join(f"{rate:.3g} at {format_count(tokens)}" for tokens, rate in plan.rates()),
        ),
        ("trains", config.train.parameters),
        ("checkpoints", _checkpoints(config)),
        ("trackers", ", ".join(["metrics.jsonl", *chosen_trackers(config.log)])),
    ]
    rows += [("not checked", note) for note in plan.notes]
    if config.expect.engine or config.expect.processes:
        rows.append(
            ("expects", f"{config.expect.engine or 'any engine'}, {config.expect.processes or 'any'} processes")
        )
    return rows


def _sources(config: UptrainConfig) -> str:
    named = config.data.named
    places = [f"{source.kind} {', '.join(source.paths)}" for _, source, _ in named]
    if len(named) == 1:
        return places[0]
    whole = sum(weight for _, _, weight in named)
    return "; ".join(
        f"{weight / whole:.4g} {name} ({place})" for (name, _, weight), place in zip(named, places, strict=True)
    )


def _held_out(config: UptrainConfig) -> str:
    amount = "all" if config.evaluation.tokens is None else f"{format_count(config.evaluation.tokens)} tokens at most"
    apart = config.data.held_out_source
    where = ", ".join(apart.paths) if apart else f"{config.data.held_out_fraction:.3g} of documents, by hash"
    every, at = config.evaluation.every_tokens, config.evaluation.at_tokens
    between = [f"every {format_count(every)} tokens"] if every else []
    between += [f"at {', '.join(map(format_count, at))} tokens"] if at else []
    when = ", ".join(["start", *between, "end"])
    more = f"; also {', '.join(config.evaluation.sets)}" if config.evaluation.sets else ""
    return f"{where}{more}; {amount}; scored at {when}"


def _objective(config: UptrainConfig) -> str:
    words: list[str] = [config.objective.kind]
    told = config.objective.distillation
    if told:
        words.append(
            f"distilled from {told.teacher} (KL x {told.weight:g} at temperature {told.temperature:g}, "
            f"cross-entropy x {told.cross_entropy_weight:g})"
        )
    return ", ".join(words)


def _checkpoints(config: UptrainConfig) -> str:
    c = config.checkpoints
    when = [f"every {c.every_steps} steps"] if c.every_steps else []
    when += [f"every {c.every_minutes:g} minutes"] if c.every_minutes else []
    return f"{' and '.join(when) or 'at start and end'}, {c.keep} kept, resume {c.resume}"
