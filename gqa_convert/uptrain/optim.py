"""Optimisers, and which parameters they move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gqa_convert.errors import UsageError
from gqa_convert.uptrain.config import LoraSection, OptimizerSection, TrainSection
from gqa_convert.uptrain.model import attention_linears, attention_norms


def choose_parameters(model: Any, settings: TrainSection) -> Any:
    """Freeze what is not to be trained; with LoRA, return the model with its adapters.

    Raises:
        UsageError: if the model has no attention projections, or peft is missing.
    """
    if settings.parameters == "all":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    projections = attention_linears(model)
    if settings.parameters == "attention":
        for layer in (*projections.values(), *attention_norms(model).values()):
            layer.requires_grad_(True)
        return model
    return _with_lora(model, projections, settings.lora)


def _with_lora(model: Any, projections: Mapping[str, nn.Module], settings: LoraSection) -> Any:
    for name, layer in projections.items():
        if "forward" in vars(type(layer)) and isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            # OPT, UMT5, Persimmon: narrow projections that repeat each KV head; an adapter's output would not.
            raise UsageError(
                f"train.parameters=lora: {name} is a {type(layer).__name__}, whose output is wider than its weight, so "
                "adapters do not fit. Train with parameters: attention, or all."
            )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("train.parameters=lora needs peft: pip install 'gqa-convert[lora]'.") from error
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(projections), bias="none")
    return get_peft_model(model, config)


def merged_model(model: Any) -> Any:
    """The plain model again: adapters merged into the projections they sit on."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.Optimizer:
    """Make the optimiser over the parameters that require gradients; the learning rate is set before every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.kind == "adafactor":
        from transformers.optimization import Adafactor

        # T5's: an outside schedule, updates relative to each parameter's size, no first moment.
        made: torch.optim.Optimizer = Adafactor(
            groups, lr=0.0, scale_parameter=True, relative_step=False, warmup_init=False, clip_threshold=1.0
        )
        return made
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def state_bytes(settings: OptimizerSection) -> int:
    """Bytes of optimiser state for a parameter (Adafactor's rows and columns come to almost nothing)."""
    return 8 if settings.kind == "adamw" else 0


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
