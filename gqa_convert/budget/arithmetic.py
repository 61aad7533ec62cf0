"""What uptraining costs: tokens, steps, FLOPs, hours, bytes. Plain arithmetic; no torch.

One horizon is derived from whichever of `steps`, `tokens` or `alpha` is given, in this order of precedence; alpha is
the share of the pretraining compute that the paper spends (Ainslie et al. 2023, section 2.1: 5 %).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gqa_convert.budget.counts import format_count
from gqa_convert.budget.shape import ModelShape, devices
from gqa_convert.errors import UsageError

DEFAULT_ALPHA = 0.05
DEFAULT_MFU = 0.4


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How long to train. `steps` whole batches of `batch_tokens`; `came_from` names the setting that decided."""

    steps: int
    tokens: int
    batch_tokens: int
    alpha: float | None
    came_from: str


def horizon(
    *,
    batch_tokens: int,
    steps: int | None = None,
    tokens: int | None = None,
    alpha: float | None = None,
    pretraining_tokens: int | None = None,
    pretraining_steps: int | None = None,
    pretraining_batch_tokens: int | None = None,
) -> Horizon:
    """Derive one horizon: `steps` before `tokens` before `alpha` (of pretraining tokens, or steps x their batch).

    A token count that is no whole number of batches is rounded up to one.

    Raises:
        UsageError: if nothing decides, or alpha has nothing to be a share of.
    """
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens={batch_tokens}: must be at least 1.")
    known = pretraining_tokens
    if known is None and pretraining_steps is not None:
        known = pretraining_steps * (pretraining_batch_tokens or batch_tokens)
    if steps is not None:
        total, came_from = steps, "steps"
    elif tokens is not None:
        total, came_from = -(-tokens // batch_tokens), "tokens"
    else:
        share = DEFAULT_ALPHA if alpha is None else alpha
        if known is None:
            raise UsageError(
                f"alpha={share}: of what? Give the pretraining tokens (or steps), the name of a known model "
                "(`gqa budget --list`), or say tokens or steps outright."
            )
        if not 0 <= share <= 1:
            raise UsageError(f"alpha={share}: a share of the pretraining budget, from 0 to 1.")
        total, came_from = -(-round(share * known) // batch_tokens), "alpha"
    spent = total * batch_tokens
    return Horizon(
        steps=total,
        tokens=spent,
        batch_tokens=batch_tokens,
        alpha=spent / known if known else None,
        came_from=came_from,
    )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The price of a run.

    Attributes:
        alpha: share of the pretraining tokens; None where those are unknown.
        tokens: trained on; input tokens for an encoder-decoder.
        steps: optimiser steps.
        student_flops: forward and backward of the model, attention included.
        teacher_flops: forward passes of the distillation teacher.
        distillation_overhead: teacher FLOPs as a share of the student's.
        hours: on the named devices at the given utilisation; None without devices.
        final_bytes: weights of the result.
        checkpoint_bytes: one training checkpoint: float32 weights and the optimiser's state.
    """

    alpha: float | None
    tokens: int
    steps: int
    batch_tokens: int
    context: int
    came_from: str
    student_flops: float
    teacher_flops: float
    distillation_overhead: float
    hardware: str | None
    device_count: int
    mfu: float
    hours: float | None
    device_hours: float | None
    final_bytes: int
    checkpoint_bytes: int

    @property
    def flops(self) -> float:
        """All FLOPs of the run."""
        return self.student_flops + self.teacher_flops

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"flops": self.flops}


def budget(
    shape: ModelShape,
    length: Horizon,
    *,
    context: int | None = None,
    teacher: ModelShape | None = None,
    hardware: str | None = None,
    device_count: int = 1,
    mfu: float = DEFAULT_MFU,
    state_bytes_per_parameter: int = 8,
    trained_parameters: int | None = None,
) -> Budget:
    """Price a run of `length` for a model of `shape`.

    Args:
        shape: the model to be trained.
        length: how long.
        context: tokens per sequence; the pretraining context by default.
        teacher: the distillation teacher; it runs forward once on every token (a third of a training pass).
        hardware: a name of `devices()`, or a number of TFLOP/s; None for no hours.
        device_count: how many of them.
        mfu: model FLOPs utilisation to assume, the share of the peak that training reaches.
        state_bytes_per_parameter: optimiser state (AdamW: two float32 moments).
        trained_parameters: those that change; all by default. Only these are in training checkpoints.

    Raises:
        UsageError: for an unknown device, or a utilisation or count out of range.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu={mfu}: a share of the peak, above 0 and at most 1.")
    if device_count < 1:
        raise UsageError(f"devices={device_count}: must be at least 1.")
    own = length.tokens * shape.training_flops_per_token(context)
    teaching = length.tokens * teacher.training_flops_per_token(context) / 3 if teacher else 0.0
    hours = None
    if hardware is not None:
        hours = (own + teaching) / (device_tflops(hardware) * 1e12 * device_count * mfu) / 3600
    trained = shape.parameters if trained_parameters is None else trained_parameters
    return Budget(
        alpha=length.alpha,
        tokens=length.tokens,
        steps=length.steps,
        batch_tokens=length.batch_tokens,
        context=shape.context if context is None else context,
        came_from=length.came_from,
        student_flops=own,
        teacher_flops=teaching,
        distillation_overhead=teaching / own if own else 0.0,
        hardware=hardware,
        device_count=device_count,
        mfu=mfu,
        hours=hours,
        device_hours=None if hours is None else hours * device_count,
        final_bytes=shape.parameters * shape.weight_bytes,
        checkpoint_bytes=trained * (4 + state_bytes_per_parameter),
    )


def device_tflops(name: str) -> float:
    """Peak dense bf16 TFLOP/s of a device by name, or the number itself.

    Raises:
        UsageError: if it is neither.
    """
    table = devices()
    if name.lower() in table:
        return float(table[name.lower()]["tflops"])
    try:
        value = float(name)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UsageError(f"hardware {name!r}: give one of {', '.join(table)}, or a number of TFLOP/s.")
    return value


def budget_rows(price: Any) -> list[tuple[str, str]]:
    """A budget as label and value, for a table."""
    from gqa_convert.console import size

    share = "" if price.alpha is None else f", alpha {price.alpha:.3g}"
    rows = [
        ("horizon", f"{price.steps:,} steps of {price.batch_tokens:,} tokens (from {price.came_from}{share})"),
        ("tokens", f"{price.tokens:,} ({format_count(price.tokens)}) at context {price.context:,}"),
        ("compute", f"{price.flops:.3g} FLOPs, attention included"),
    ]
    if price.teacher_flops:
        rows.append(("distillation", f"+{price.distillation_overhead:.0%} for the teacher's forward passes"))
    if price.hours is not None:
        rows.append(
            (
                "time",
                f"{price.hours:,.1f} hours on {price.device_count} x {price.hardware} at {price.mfu:.0%} of peak "
                f"({price.device_hours:,.0f} device hours)",
            )
        )
    rows.append(("result", f"{size(price.final_bytes)} of weights"))
    rows.append(("checkpoint", f"{size(price.checkpoint_bytes)} each while training"))
    return rows
