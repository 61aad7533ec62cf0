"""What solving a plan's blocks will take here: operations and memory by count, time by a trial of the machine.

`scripts/bench/solve_cost.py` holds the counts against measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_convert.budget.machine import free_memory, has_bfloat16, matmul_rate
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
_SPARED = 0.5
"""Share that bfloat16 spares of steps and streams on a processor with instructions for it (steps .48, streams .42)."""
_QUICKER = ("refit: steps", "stream of the source", "stream of the converted model")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the cost of solving follows from, in all layers together where nothing else is said.

    Attributes:
        tokens: that are calibrated on.
        layers: how many are solved.
        width: of the hidden states.
        whole: weights of all layers.
        source: of those, the weights that are solved.
        target: what is left of them.
        scores: operations per token of queries on keys and of attention on values.
        sets: sets of heads that a search prices, per layer; 0 without one.
        group_width: channels of a group's heads together.
        refit: whether attention is fitted to the source's outputs afterwards.
        fitted: tokens that its steps read, per layer.
    """

    tokens: int
    layers: int
    width: int
    whole: int
    source: int
    target: int
    scores: int
    sets: int = 0
    group_width: float = 0
    refit: bool = False
    fitted: int = 0

    @property
    def converted(self) -> int:
        """Weights of all layers of the converted model."""
        return self.whole - self.source + self.target


def searched_sets(heads: int) -> int:
    """About how many sets of `heads` KV heads a search for groups prices."""
    return min(1000, heads * (heads - 1) // 2 + 600)


def operations(work: Work) -> dict[str, float]:
    """Floating-point operations of a solve by part, two for a multiply-add."""
    flops: dict[str, float] = {
        "stream of the source": work.tokens * (2 * work.whole + work.scores),
        "moments": work.layers * 2 * work.tokens * work.width**2,
        "closed form": work.layers * 8 * work.width**3,
        "search": work.layers * work.sets * 10 * work.group_width**3,  # an eigenvalue problem of a group's values each
    }
    if work.refit:
        attention = 2 * work.target + work.scores
        flops["stream of the converted model"] = work.tokens * (
            2 * (work.whole - work.source + work.target) + work.scores
        )
        flops["refit: steps"] = 3 * work.fitted * attention
        flops["refit: held-out checks"] = _CHECKS * work.tokens / _HELD_OUT * attention
    return flops


def held_bytes(work: Work) -> dict[str, float]:
    """Bytes that a solve holds by part, all activations in memory: float32, moments in float64."""
    weights = work.whole + (work.converted if work.refit else 0)
    return {
        "moments": 8 * work.width**2,
        "layer": 4 * weights / work.layers,
        "activations": (6 if work.refit else 2) * 4 * work.tokens * work.width,
    }


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
    from torch import cuda

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
    searches = recipe.grouping == "search" and plan.groups > 1
    work = Work(
        tokens=tokens,
        layers=layers,
        width=width,
        whole=whole,
        source=source,
        target=target,
        scores=4 * length * before.num_query_heads * before.head_dim * layers,
        sets=searched_sets(before.num_kv_heads) if searches else 0,
        group_width=before.num_kv_heads / plan.groups * before.head_dim,
        refit=recipe.refit,
        fitted=recipe.refit_steps * recipe.refit_tokens,
    )
    counted = operations(work)
    flops = sum(counted.values())
    spared = 0.0
    if not cuda.is_available() and has_bfloat16("cpu"):
        spared = _SPARED * sum(counted.get(part, 0.0) for part in _QUICKER)
    if recipe.self_written:
        flops += _WRITING * 2 * plan.parameters_in * tokens
    parts = held_bytes(work)
    held = parts["moments"] + parts["layer"] + min(parts["activations"], _SPILLED * free_memory())
    if recipe.self_written:
        held = max(held, plan.bytes_in)
    return Forecast(flops=flops, seconds=(flops - spared) / (REACHED * matmul_rate()), memory_bytes=round(PEAK * held))
