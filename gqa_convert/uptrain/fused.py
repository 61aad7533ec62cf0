"""Fused paths that are taken where they run: liger's kernels, flash attention. Each falls back, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from gqa_convert.errors import UsageError
from gqa_convert.uptrain.config import TrainSection
from gqa_convert.uptrain.model import computing, evaluating, probe_inputs, run_model

_KERNELS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Of liger's: norms, rotary embeddings and gated MLPs. The loss is computed from chunks of logits here already."""
_TOLERANCE = 2e-2
"""Of a logit, as a share of the largest."""


def chosen_attention(settings: TrainSection, model_class: Any, device: torch.device) -> str:
    """The implementation of attention: the one that was named, or for `auto` the fastest that keeps documents apart.

    On a GPU with 16-bit arithmetic that is flash attention, if it is installed and the model has it; else sdpa.

    Args:
        settings: of the run.
        model_class: transformers' class of the model.
        device: where it computes.
    """
    if settings.attention != "auto":
        return settings.attention
    fits = device.type == "cuda" and settings.precision != "float32"
    if fits and getattr(model_class, "_supports_flash_attn", False) and _flash_is_there():
        return "flash_attention_2"
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def _flash_is_there() -> bool:
    from transformers.utils.import_utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def uses_liger(settings: TrainSection, device: torch.device, tell: Callable[[str], None]) -> bool:
    """Whether liger's kernels are to be used.

    Args:
        settings: of the run.
        device: where it computes.
        tell: told why they are not, where `auto` has left that open.

    Raises:
        UsageError: if they were asked for outright and cannot be.
    """
    if settings.liger is False:
        return False
    problem = None
    if find_spec("liger_kernel") is None:
        problem = "liger-kernel is not installed (pip install liger-kernel)"
    elif device.type != "cuda":
        problem = f"its kernels run on GPUs, and this is a run on {device.type}"
    if problem is None:
        return True
    if settings.liger is True:
        raise UsageError(f"train.liger=true: {problem}. Set it to auto to go on without.")
    tell(f"without liger: {problem}")
    return False


@torch.no_grad()
def put_liger_in(model: Any, *, wanted: bool, tried_on: Any | None = None) -> bool:
    """Let a model compute with liger's kernels, and make sure that it computes the same.

    Args:
        model: of transformers, unsharded or with `tried_on`.
        wanted: it was asked for outright.
        tried_on: a small model of the same code, where the model itself cannot be run as yet.

    Returns:
        Whether liger knows the family.

    Raises:
        UsageError: if the logits are others with its kernels, or it was asked for and does not know the family.
    """
    from transformers.integrations.liger import apply_liger_kernel

    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    family = str(getattr(model.config, "model_type", ""))
    if family not in known:
        if wanted:
            raise UsageError(f"train.liger=true: liger-kernel has no kernels for {family}. Set it to auto or false.")
        return False
    tried = model if tried_on is None else tried_on
    before = _logits(tried)
    for each in (tried,) if tried is model else (tried, model):
        apply_liger_kernel(each, dict(_KERNELS))
    share = float((_logits(tried) - before).abs().max() / before.abs().max().clamp_min(1e-6))
    if not share <= _TOLERANCE:
        raise UsageError(
            f"train.liger: logits of {type(model).__name__} change by {share:.2g} of their size with liger's kernels. "
            "Set it to false."
        )
    return True


def _logits(model: Any) -> torch.Tensor:
    inputs = probe_inputs(model, 1, 16, restart=None)
    with evaluating(model), computing(model):
        return run_model(model, inputs, skip_head=False)[0].float()
