"""The optimisers: one row each. Imports no torch until one is made.

A row says how an optimiser is made, how many bytes of state it keeps, and what it cannot do; configuration, plan and
training loop read the rows: a new optimiser is one more call of `register` below, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqa_convert.budget.solving import muon_flops

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gqa_convert.uptrain.config import OptimizerSection

BY_ADAMW = "by_adamw"
"""Key of a group of parameters that Muon is not meant for."""

HEADS = "heads"
"""Key of a group of weights that hold their heads along one side: that side, and the width of a head."""

RATE_SHARE = "rate_share"
"""Key of a group of parameters that learns at this share of the schedule's rate."""

ParameterGroups = list[dict[str, Any]]
"""Groups of parameters as torch's optimisers take them: `params`, `weight_decay`."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One row.

    Attributes:
        name: `optimizer.kind` of the configuration.
        make: makes it over groups of parameters; the learning rate is set before every step.
        state_bytes: bytes of state for each trained parameter, in training checkpoints and memory.
        step_flops: operations of one step over parameters of these shapes, where they are worth counting.
        inner_matrices: it is meant for matrices inside the model; `make` gets the others in groups of their own, marked
            `BY_ADAMW`.
        whole_matrices: it looks at whole matrices, so that ZeRO-3, which cuts them up, cannot use it.
    """

    name: str
    make: Callable[[ParameterGroups, OptimizerSection], torch.optim.Optimizer]
    state_bytes: int
    step_flops: Callable[[Iterable[tuple[int, ...]]], float] = lambda shapes: 0.0
    inner_matrices: bool = False
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
    """Make the optimiser over the parameters that require gradients; vectors and embeddings are not decayed.

    A step moves the rows of an embedding whose tokens it met; decay would shrink the others at every step, rare tokens
    the more the rarer they are.
    """
    from gqa_convert.uptrain.model import attention_parameters, head_sides

    row = get_optimizer(settings.kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    undecayed = _embeddings(model) if settings.weight_decay and not settings.decay_embeddings else set()
    groups: ParameterGroups = [
        {"params": [p for p in matrices if id(p) not in undecayed], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2 or id(p) in undecayed], "weight_decay": 0.0},
    ]
    if row.inner_matrices:
        outer = vocabulary_weights(model)
        inner = [p for p in matrices if p.ndim == 2 and id(p) not in outer]
        others = [p for p in matrices if (p.ndim > 2 or id(p) in outer) and id(p) not in undecayed]
        rest = {"params": others, "weight_decay": settings.weight_decay}
        heads = head_sides(model) if settings.per_head else {}
        apart: dict[tuple[int, int] | None, list[nn.Parameter]] = {}
        for matrix in inner:
            apart.setdefault(heads.get(id(matrix)), []).append(matrix)
        groups = [
            *({**groups[0], "params": each, HEADS: key} for key, each in apart.items()),
            {**rest, BY_ADAMW: True},
            {**groups[1], BY_ADAMW: True},
        ]
    if settings.outside_attention != 1:
        inside = {id(parameter) for parameter in attention_parameters(model)}
        groups = [part for group in groups for part in _by_place(group, inside, settings.outside_attention)]
    return row.make([group for group in groups if group["params"]], settings)


def _by_place(group: dict[str, Any], inside: set[int], share: float) -> ParameterGroups:
    """A group in two: what lies in attention, and the rest at its share of the rate."""
    within = [p for p in group["params"] if id(p) in inside]
    rest = [p for p in group["params"] if id(p) not in inside]
    return [{**group, "params": within}, {**group, "params": rest, RATE_SHARE: share}]


def _embeddings(model: nn.Module) -> set[int]:
    """Ids of the embeddings, an output matrix that is tied to one among them."""
    from torch import nn

    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def vocabulary_weights(model: nn.Module) -> set[int]:
    """Ids of the embeddings and of the output matrix."""
    from torch import nn

    outputs = (getattr(module, "get_output_embeddings", lambda: None)() for module in model.modules())
    return _embeddings(model) | {id(output.weight) for output in outputs if isinstance(output, nn.Linear)}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in the next step, in groups that have a share of it that share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_SHARE, 1.0)


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


def _muon(groups: ParameterGroups, settings: OptimizerSection) -> torch.optim.Optimizer:
    """Matrices inside the model by Muon, everything else by AdamW, at the same learning rate."""
    import torch

    from gqa_convert.uptrain.muon import MuonWithAdamW

    dtype = torch.float32 if settings.muon_dtype == "float32" else torch.bfloat16
    return MuonWithAdamW(groups, betas=settings.betas, eps=settings.eps, relative=settings.relative, dtype=dtype)


# AdamW keeps two float32 moments; Adafactor the sums of rows and columns, almost nothing; Muon the momentum.
register(Optimizer(name="adamw", make=_adamw, state_bytes=8))
register(Optimizer(name="adafactor", make=_adafactor, state_bytes=0, whole_matrices=True))
register(
    Optimizer(name="muon", make=_muon, state_bytes=4, step_flops=muon_flops, inner_matrices=True, whole_matrices=True)
)
