"""What a run will take on this machine, told before it starts: time from a measured matrix product, memory by count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_convert.budget.machine import matmul_rate
from gqa_convert.budget.memory import TrainingSetup, training_memory
from gqa_convert.budget.shape import shape_of_folder
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain.model import attention_parameters, head_sides, teacher_dtype
from gqa_convert.uptrain.optim import get_optimizer, vocabulary_weights

if TYPE_CHECKING:
    from gqa_convert.uptrain.config import UptrainConfig

REACHED = 0.45
"""Share of a large matrix product's rate that training reaches (SmolLM2-135M on a core of an AMD EPYC: 0.45 to 0.5)."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a distillation will take.

    Attributes:
        trained: parameters that change.
        flops: operations of the whole run: both models' forward passes, the backward pass through the frozen parts, and
            the optimiser's where they are many.
        hours: of training on this machine, evaluation and loading left out.
        memory_bytes: weights of both models, gradients, moments, activations of a micro-batch, logits of a chunk.
    """

    trained: int
    flops: float
    hours: float
    memory_bytes: int


def forecast(config: UptrainConfig, source: Path, teacher: Path, *, tokens: int, processes: int = 1) -> Forecast:
    """Count and measure what a distillation takes, of attention alone or of all parameters.

    Args:
        config: the run.
        source: the converted model's folder.
        teacher: the original's.
        tokens: to train on.
        processes: that share the work.
    """
    import torch

    shape, taught = shape_of_folder(source), shape_of_folder(teacher)
    converted = Source.open(source, trust_remote_code=config.trust_remote_code)
    model = converted.meta_model
    chosen = attention_parameters(model) if config.train.parameters == "attention" else list(model.parameters())
    trained = sum(math.prod(parameter.shape) for parameter in chosen)
    outer = vocabulary_weights(model)
    heads = head_sides(model) if config.optimizer.per_head else {}
    shapes = [part for p in chosen if id(p) not in outer for part in _parts(tuple(p.shape), heads.get(id(p)))]
    optimizer = get_optimizer(config.optimizer.kind)
    context = config.data.context
    backward_and_forward = shape.training_flops_per_token(context) * 2 / 3
    per_token = backward_and_forward + 2 * trained + taught.training_flops_per_token(context) / 3
    held = training_memory(shape, training_setup(config, processes=processes, trained=trained), taught)
    rate = matmul_rate(torch.float32 if config.train.precision == "float32" else torch.bfloat16)
    steps = tokens / (config.train.batch_sequences * context)
    shared, repeated = tokens * per_token, steps * optimizer.step_flops(shapes)  # every process steps for itself
    hours = (shared / processes + repeated) / (REACHED * rate) / 3600
    return Forecast(trained=trained, flops=shared + repeated, hours=hours, memory_bytes=held.peak)


def _parts(shape: tuple[int, ...], heads: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """The shapes that an optimiser looks at: a weight's own, or those of its heads."""
    if heads is None:
        return [shape]
    side, width = heads
    return [(width, shape[1 - side])] * (shape[side] // width)


def training_setup(config: UptrainConfig, *, processes: int = 1, trained: int | None = None) -> TrainingSetup:
    """What of a run its memory depends on; the engine is the expected one, else what so many processes usually have.

    Args:
        config: the run.
        processes: that share the work.
        trained: parameters that change, where that was counted.
    """
    import torch

    train, distillation = config.train, config.objective.distillation
    engine = config.expect.engine or ("single" if processes == 1 else "ddp")
    each = train.micro_batch * processes
    device = "cuda" if train.device == "auto" and torch.cuda.is_available() else "cpu"
    return TrainingSetup(
        engine=engine,
        devices=processes,
        context=config.data.context,
        micro_batch=train.micro_batch,
        accumulation=max(1, train.batch_sequences // each),
        precision=train.precision,
        parameters=train.parameters,
        trained=trained,
        state_bytes=get_optimizer(config.optimizer.kind).state_bytes,
        checkpointing=train.gradient_checkpointing,
        chunk=config.objective.loss_chunk,
        teacher_bytes=teacher_dtype(distillation.dtype, device).itemsize if distillation else 2,
        hidden=bool(distillation and distillation.hidden_weight),
        step_sync=train.fsdp_sync == "step",
        averages=config.averaging.decay is not None,
        device=device,
    )


def training_precision() -> str:
    """`bf16` where this machine computes faster in it, else `float32` (some processors are far slower in it)."""
    import torch

    return "bf16" if matmul_rate(torch.bfloat16) > 1.2 * matmul_rate(torch.float32) else "float32"
