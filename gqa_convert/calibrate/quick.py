"""Arithmetic of calibration: products in bfloat16 where a processor has instructions for it, the rest as given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from gqa_convert.budget.machine import has_bfloat16

if TYPE_CHECKING:
    import torch


def quick_products(device: torch.device | str) -> AbstractContextManager[Any]:
    """Compute float32's linear maps and attention in bfloat16 within a `with` block, where a processor is fast in it.

    Unlike autocast it gives every result in the type of what went in: norms, residual sums, and whatever a model's own
    code does with types stay as they are. Rounding is that of bfloat16's eight bits, sums are float32's. Elsewhere, and
    on other devices than a processor, nothing changes.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    if torch.device(device).type != "cpu" or not has_bfloat16("cpu"):
        return nullcontext()
    products = (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention)

    class QuickProducts(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if func not in products or next(iter((*args, *kwargs.values()))).dtype != torch.float32:
                return func(*args, **kwargs)
            rounded = {name: _rounded(x, bounded=name == "attn_mask") for name, x in kwargs.items()}
            return func(*map(_rounded, args[:3]), *(_rounded(x, bounded=True) for x in args[3:]), **rounded).float()

    return QuickProducts()


def _rounded(value: Any, *, bounded: bool = False) -> Any:
    """In bfloat16; a mask's least float32 is beyond its range, and ends at its bound (`bounded`), not in infinity."""
    import torch

    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    most = torch.finfo(torch.bfloat16).max
    return (value.clamp(-most, most) if bounded else value).bfloat16()
