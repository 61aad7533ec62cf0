"""Puts a run together: data, model, teacher, optimiser, in the engine's hands."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gqa_convert.budget.memory import chunk_positions
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.data.batches import MicroBatch, StepBatches
from gqa_convert.errors import UsageError
from gqa_convert.hf.loading import Source, load_model
from gqa_convert.uptrain import optim, parameters
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.corpus import TrainingData, prepare_data
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.fused import chosen_attention, put_liger_in, uses_liger
from gqa_convert.uptrain.model import (
    ScoredModel,
    Teacher,
    can_skip_head,
    check_finite,
    check_isolation,
    check_reads_text,
    set_dropout,
    teacher_dtype,
)
from gqa_convert.uptrain.objective import LossSpec, TeacherOutput
from gqa_convert.uptrain.plan import UptrainPlan
from gqa_convert.uptrain.sharded_loading import tiny_twin
from gqa_convert.uptrain.teacher_cache import CachedTeacher
from gqa_convert.uptrain.unused_parameters import freeze_modules, freeze_unreached


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A run's parts.

    Attributes:
        plan: what is to be done.
        engine: how processes work together.
        data: training and held-out blocks.
        batches: this process's micro-batches by step.
        plain: the transformers model (with its adapters, under LoRA).
        model: its wrapped and prepared form; calling it gives the loss.
        optimizer: prepared.
        teacher: the frozen original, when distilling from it.
        cached: what it said about the training blocks, when distilling from a cache.
        trained: the parameters that change.
    """

    plan: UptrainPlan
    engine: Engine
    data: TrainingData
    batches: StepBatches
    plain: Any
    model: nn.Module
    optimizer: Any
    teacher: Teacher | None
    trained: list[nn.Parameter]
    cached: CachedTeacher | None = None

    @property
    def distils(self) -> bool:
        """Whether the original is learnt from."""
        return self.teacher is not None or self.cached is not None

    def taught(self, batch: MicroBatch) -> TeacherOutput | None:
        """What the original says about a training micro-batch on this process's device; None without distillation."""
        if self.cached is not None:
            return self.cached(batch.blocks, self.engine.device)
        return self.teacher(batch.inputs) if self.teacher is not None else None

    def scoring_model(self) -> nn.Module:
        """The model to evaluate with: without DDP's bookkeeping."""
        return self.engine.accelerator.unwrap_model(self.model) if self.engine.name == "ddp" else self.model


def build(
    plan: UptrainPlan,
    engine: Engine,
    *,
    tell: Callable[[str], None],
    data_state: dict[str, Any] | None,
    stopped: Callable[[], bool] = lambda: False,
) -> Parts:
    """Load and prepare everything.

    Args:
        plan: what is to be done.
        engine: started.
        tell: told of long work.
        data_state: of the checkpoint to resume from.
        stopped: asked now and then during long work; True ends it.

    Raises:
        Preempted: if `stopped` says so.
        GQAConvertError: whatever is wrong with data, model, or their fit.
    """
    config = plan.config
    if config.train.deterministic:
        # Without it cuBLAS refuses; it must stand before the first product on the device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.train.seed)
    source = Source.open(plan.source, trust_remote_code=config.trust_remote_code)
    for note in source.notes:
        tell(note)
    tokenizer = source.tokenizer()
    if getattr(source.config, "is_encoder_decoder", False):
        check_reads_text(source.model_type, source.model_class)

    def prepare(first: bool) -> TrainingData:
        said = tell if engine.is_main else lambda _: None
        return prepare_data(config, tokenizer, source.config, tell=said, state=data_state, stopped=stopped, check=first)

    data = engine.main_first(prepare)
    distillation = config.objective.distillation
    cached: CachedTeacher | None = None
    if distillation is not None and distillation.cache is not None:
        needed = plan.horizon.steps * config.train.batch_sequences
        cached = CachedTeacher.open(Path(distillation.cache), config, data, blocks=needed)
    batches = StepBatches(
        data.blocks,
        data.collate,
        sequences=config.train.batch_sequences,
        micro=config.train.micro_batch,
        processes=engine.processes,
        rank=engine.rank,
    )
    dtype = torch.bfloat16 if config.train.precision == "pure_bf16" else torch.float32
    twin = _twin(source, config, engine)
    attention = chosen_attention(config.train, source.model_class, engine.device)
    if config.train.attention == "auto":
        tell(f"attention by {attention}")
    liger = uses_liger(config.train, engine.device, tell)
    if twin is None:
        model = load_model(source, dtype=dtype, attention=attention)
        if engine.name != "fsdp2" or "flash" in attention or liger:
            model.to(engine.device)
        check_finite(model, str(plan.source))
        if engine.name == "fsdp2":
            tell("each process loads the model whole: no small one can be made of its kind to try things on")
    else:
        model = engine.load_sharded(source, dtype=dtype, attention=attention)
    if liger and put_liger_in(model, wanted=config.train.liger is True, tried_on=twin):
        tell("norms, rotary embeddings and gated MLPs by liger's kernels")
    if config.separate_documents:
        share = check_isolation(model if twin is None else twin)
        tell(f"documents are kept apart: logits change by {share:.1e} of their size beside another document")
    if config.train.dropout is not None:
        set_dropout(model, config.train.dropout)
    model = parameters.choose_parameters(model, config.train)
    if config.train.gradient_checkpointing:
        # Its name before transformers 5.22 or so, and since.
        new = hasattr(model, "activation_checkpointing_enable")
        enable: Any = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if config.train.parameters != "all":
            model.enable_input_require_grads()
    spec = loss_spec(plan)
    teacher = _teacher(plan, engine, model) if plan.teacher else None
    if twin is None:
        scored = ScoredModel(model, spec).train()
        freeze_unreached(scored, tell)
    else:
        scored = ScoredModel(model, spec, skips_head=can_skip_head(twin)).train()
        tried = ScoredModel(parameters.choose_parameters(twin, config.train), spec)
        freeze_modules(scored, freeze_unreached(tried, tell))
    if config.train.compile:
        model.compile()
    if twin is None:
        optimizer = optim.make_optimizer(scored, config.optimizer)
        prepared, prepared_optimizer = engine.prepare(scored, optimizer)
    else:
        prepared = engine.shard_rest(scored)
        prepared_optimizer = optim.make_optimizer(prepared, config.optimizer)
    return Parts(
        plan=plan,
        engine=engine,
        data=data,
        batches=batches,
        plain=model,
        model=prepared,
        optimizer=prepared_optimizer,
        teacher=teacher,
        trained=[p for p in prepared.parameters() if p.requires_grad],
        cached=cached,
    )


def _twin(source: Source, config: UptrainConfig, engine: Engine) -> Any | None:
    """A tiny model to try things on, where the real one is never whole in any process; None where it is."""
    if engine.name != "fsdp2" or config.train.parameters == "lora":
        return None
    twin = tiny_twin(source, chosen_attention(config.train, source.model_class, engine.device))
    return None if twin is None else twin.to(engine.device)


def loss_spec(plan: UptrainPlan) -> LossSpec:
    """The loss that the configuration asks for."""
    objective = plan.config.objective
    settings = objective.distillation
    chunk = objective.loss_chunk or chunk_positions(plan.shape.vocab_size)
    if settings is None:
        return LossSpec(chunk=chunk)
    return LossSpec(
        ce_weight=settings.cross_entropy_weight,
        kl_weight=settings.weight,
        temperature=settings.temperature,
        top_k=settings.top_k,
        hidden_weight=settings.hidden_weight,
        chunk=chunk,
    )


def _teacher(plan: UptrainPlan, engine: Engine, student: Any) -> Teacher:
    settings = plan.config.objective.distillation
    assert settings is not None
    assert plan.teacher is not None
    dtype = teacher_dtype(settings.dtype, engine.device)
    original = Source.open(plan.teacher, trust_remote_code=plan.config.trust_remote_code)
    model, twin = _frozen(original, plan.config, engine, dtype, f"objective.distillation.teacher={settings.teacher}")
    if plan.config.separate_documents:
        check_isolation(model if twin is None else twin)
    skips_head = None if twin is None else can_skip_head(twin)
    teacher = Teacher(model, layers=settings.hidden_weight > 0, skips_head=skips_head)
    vocabulary = int(student.config.get_text_config(decoder=True).vocab_size)
    if settings.compile:
        model.compile()
    if teacher.vocabulary != vocabulary:
        raise UsageError(
            f"objective.distillation.teacher={settings.teacher}: its vocabulary has {teacher.vocabulary} tokens, the "
            f"model's {vocabulary}. Give the original that the model was converted from."
        )
    return teacher


def _frozen(
    original: Source, config: UptrainConfig, engine: Engine, dtype: torch.dtype, name: str
) -> tuple[Any, Any | None]:
    """A model that is not trained: sharded under FSDP2, with a tiny one to try things on; else whole."""
    twin = _twin(original, config, engine)
    attention = chosen_attention(config.train, original.model_class, engine.device)
    if twin is not None:
        model = engine.load_sharded(original, dtype=dtype, attention=attention)
        return engine.shard_rest(model.requires_grad_(False)), twin
    model = load_model(original, dtype=dtype, attention=attention, device=engine.device)
    check_finite(model, name)
    return model, None


def load_reference(plan: UptrainPlan, engine: Engine) -> Any | None:
    """Load the original that the run is compared with, if one is named; the teacher is reused by the caller."""
    name = plan.config.evaluation.reference
    if name is None:
        return None
    original = Source.open(resolve_model(name), trust_remote_code=plan.config.trust_remote_code)
    return _frozen(original, plan.config, engine, torch.float32, f"evaluation.reference={name}")[0]
