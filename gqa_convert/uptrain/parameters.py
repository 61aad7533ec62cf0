"""Which parameters a run trains: all, the attention's, or adapters on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gqa_convert.errors import UsageError
from gqa_convert.uptrain.config import LoraSection, TrainSection
from gqa_convert.uptrain.model import attention_linears, attention_parameters


def choose_parameters(model: Any, settings: TrainSection) -> Any:
    """Freeze what is not to be trained; with LoRA, return the model with its adapters.

    Raises:
        UsageError: if the model has no attention projections, or peft is missing.
    """
    if settings.parameters == "all":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if settings.parameters == "attention":
        for parameter in attention_parameters(model):
            parameter.requires_grad_(True)
        return model
    return _with_lora(model, attention_linears(model), settings.lora)


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
