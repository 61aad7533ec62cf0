"""Runs a tiny model with one and the same vector added to all keys of every head."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from torch import Tensor, nn

_EAGER = "eager_attention_forward"  # what transformers calls it in each family's own file
_SHIFT = 30.0


@contextmanager
def shifted_keys(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Add a vector to all keys in transformers' attention functions, for the duration of a `with` block.

    Yields:
        How many calls have been changed so far; 0 if this model computes attention in code of its own.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = 0

    def shifting(real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(module, query, key + _noticed(query, _vector(key)), *args, **kwargs)

        return forward

    with ExitStack() as stack:
        shifted = {name: shifting(function) for name, function in ALL_ATTENTION_FUNCTIONS.items()}
        stack.enter_context(patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, shifted))
        for file in {type(module).__module__ for module in model.modules()}:
            if hasattr(sys.modules.get(file), _EAGER):
                stack.enter_context(
                    patch.object(sys.modules[file], _EAGER, shifting(getattr(sys.modules[file], _EAGER)))
                )
        yield lambda: calls


def _noticed(query: Tensor, vector: Tensor) -> Tensor:
    """The vector, so long that a score moves by up to `_SHIFT`: enough for a soft cap to bend it."""
    scores = query @ vector * query.shape[-1] ** -0.5
    noticed: Tensor = vector * (_SHIFT / scores.abs().max().clamp(min=1e-6))
    return noticed


@contextmanager
def shifted_outputs(projections: Iterable[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Add a vector to what these projections give for every token, for the duration of a `with` block.

    Each comes with a function that gives the mask (X,) of its output: 1 where it is keys.
    """

    def hook(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda module, args, out: out + mask(out) * _vector(out) * out.std()

    with ExitStack() as stack:
        for projection, mask in projections:
            stack.callback(projection.register_forward_hook(hook(mask)).remove)
        yield


def _vector(like: Tensor) -> Tensor:
    """(D,) of normal numbers."""
    import torch

    return torch.randn(like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like)
