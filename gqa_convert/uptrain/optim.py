"""The optimisers: one row each. Imports no torch until one is made.

A row says how an optimiser is made, how many bytes of state it keeps, and what it cannot do; configuration, plan and
training loop read the rows: a new optimiser is one more call of `register` below, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gqa_convert.uptrain.config import OptimizerSection

ParameterGroups = list[dict[str, Any]]
"""Groups of parameters as torch's optimisers take them: `params`, `weight_decay`."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One row.

    Attributes:
        name: `optimizer.kind` of the configuration.
        make: makes it over groups of parameters; the learning rate is set before every step.
        state_bytes: bytes of state for each trained parameter, in training checkpoints and memory.
        whole_matrices: it looks at whole matrices, so that ZeRO-3, which cuts them up, cannot use it.
    """

    name: str
    make: Callable[[ParameterGroups, OptimizerSection], torch.optim.Optimizer]
    state_bytes: int
    whole_matrices: bool = False


_OPTIMIZERS: dict[str, Optimizer] = {}


def register(optimizer: Optimizer) -> Optimizer:
    """Add a row.

    Raises:
        ValueError: if the name is taken.
    """
    if optimizer.name in _OPTIMIZERS:
        raise ValueError(f"optimiser {optimizer.name!r} is registered twice")
    _OPTIMIZERS[optimizer.name] = optimizer
    return optimizer


def get_optimizer(name: str) -> Optimizer:
    """The row of that name.

    Raises:
        ValueError: if there is none; names those there are.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(f"choose one of {', '.join(_OPTIMIZERS)}")
    return _OPTIMIZERS[name]


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.Optimizer:
    """Make the optimiser over the parameters that require gradients; vectors (norms, biases) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: ParameterGroups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return get_optimizer(settings.kind).make([group for group in groups if group["params"]], settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _adamw(groups: ParameterGroups, settings: OptimizerSection) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def _adafactor(groups: ParameterGroups, settings: OptimizerSection) -> torch.optim.Optimizer:
    """T5's: an outside schedule, updates relative to each parameter's size, no first moment."""
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(
        groups, lr=0.0, scale_parameter=True, relative_step=False, warmup_init=False, clip_threshold=1.0
    )
    return optimizer


# AdamW keeps two float32 moments; Adafactor the sums of rows and columns, which come to almost nothing.
register(Optimizer(name="adamw", make=_adamw, state_bytes=8))
register(Optimizer(name="adafactor", make=_adafactor, state_bytes=0, whole_matrices=True))
