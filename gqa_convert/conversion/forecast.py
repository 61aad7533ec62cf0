"""What solving a plan's blocks will take here: operations and memory by count, time by a trial of the machine.

The arithmetic is that of `scripts/bench/solve_cost.py`, which holds it against measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_convert.budget.machine import free_memory, matmul_rate
from gqa_convert.budget.solving import PEAK
from gqa_convert.conversion.operations import Solve
from gqa_convert.hf.loading import max_positions

if TYPE_CHECKING:
    from gqa_convert.conversion.plan import ConvertPlan

REACHED = 0.6
"""Share of a large matrix product's rate that solving reaches (measured at widths 256 to 1,024)."""
_SPILLED = 0.5
"""Activations beyond this share of the free memory go to files."""
_WRITING = 3
"""How many times dearer a token is that is written one by one than one that is read."""
_HELD_OUT = 16  # one window in so many is kept from the fitting, and checked seven times
_CHECKS = 7


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What solving will take.

    Attributes:
        flops: floating-point operations, two for a multiply-add.
        seconds: on this machine.
        memory_bytes: beyond the libraries' own.
    """

    flops: float
    seconds: float
    memory_bytes: int


def forecast(plan: ConvertPlan) -> Forecast | None:
    """Estimate what solving a plan will take; None if it solves nothing or calibrates on nothing."""
    solved = [operation for operation in plan.operations if isinstance(operation, Solve)]
    recipe = plan.recipe
    if not solved or recipe.calibrate is None or plan.blocks is None:
        return None
    from gqa_convert.calibrate.tokens import window_plan  # it reads text, and most conversions read none

    sequences, length = window_plan(
        max_positions(plan.anatomy.config), sequences=recipe.sequences, length=recipe.length
    )
    tokens, layers = sequences * length, len(plan.blocks.blocks)
    text = plan.anatomy.config.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None)
    width = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0) or max(solved[0].source_shape))
    source = sum(math.prod(operation.source_shape) for operation in solved)
    target = sum(operation.numel for operation in solved)
    whole = sum(info.numel for info in plan.checkpoint.tensors.values() if vocabulary not in info.shape)
    before = plan.layout_before
    scores = 4 * length * before.num_query_heads * before.head_dim * layers  # per token: q k and p v
    flops: float = tokens * (2 * whole + scores) + layers * (2 * tokens * width**2 + 8 * width**3)
    if recipe.grouping == "search" and plan.groups > 1:
        group = before.num_kv_heads / plan.groups * before.head_dim
        flops += layers * min(1000, before.num_kv_heads * (before.num_kv_heads - 1) // 2 + 600) * 10 * group**3
    layer: float = 4 * whole / layers
    if recipe.refit:
        flops += tokens * (2 * (whole - source + target) + scores)
        flops += 3 * recipe.refit_steps * recipe.refit_tokens * (2 * target + scores)
        flops += _CHECKS * tokens / _HELD_OUT * (2 * target + scores)
        layer *= 2
    if recipe.self_written:
        flops += _WRITING * 2 * plan.parameters_in * tokens
    activations = (6 if recipe.refit else 2) * 4 * tokens * width
    held = 8 * width**2 + layer + min(activations, _SPILLED * free_memory())
    if recipe.self_written:
        held = max(held, plan.bytes_in)
    return Forecast(flops=flops, seconds=flops / (REACHED * matmul_rate()), memory_bytes=round(PEAK * held))
