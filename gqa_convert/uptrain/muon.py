"""Muon for the matrices inside a model, whole or head by head; AdamW for embeddings, vectors and the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gqa_convert.uptrain.optim import BY_ADAMW, HEADS

_ROUNDS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""The quintic of Jordan et al. 2024: singular values between 0.7 and 1.2 after five rounds."""


USUAL_SIZE, SMALLEST_SIZE = 0.2, 1e-3
"""Root mean square of an AdamW step at a rate of 1; the least that a matrix counts as, so that a new one can grow."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon, and torch's AdamW over some of the same groups and the same state.

    A step of Muon is the momentum with its singular values made alike (Jordan et al. 2024, "Muon: an optimizer for
    hidden layers in neural networks"), scaled to the root mean square of an AdamW step (Liu et al. 2025, arXiv
    2502.16982, section 2.2), so that one learning rate does for both. Groups with `heads` are taken apart into the
    heads' own matrices first: heads compute apart, and narrow matrices cost a fraction of a wide one's products.

    Args:
        groups: as torch's optimisers take them; those with `by_adamw` true go to AdamW. `heads` is the side along which
            a weight holds its heads and their width, or None.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
        relative: a step of Muon has the root mean square of its matrix times the rate (Shazeer and Stern 2018, arXiv
            1804.04235, section 8), instead of `USUAL_SIZE` times the rate.
        dtype: what Muon's products are computed in.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        relative: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._dtype, self._relative = dtype, relative
        self._options: dict[str, Any] = {"betas": betas, "eps": eps}
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, BY_ADAMW: False, HEADS: None}
        super().__init__(groups, defaults)
        self._bind()

    def _bind(self) -> None:
        """Make AdamW over this one's own groups and state."""
        by_adamw = [group for group in self.param_groups if group[BY_ADAMW]]
        self._adamw: torch.optim.AdamW | None = None
        if by_adamw:
            self._adamw = torch.optim.AdamW(by_adamw, lr=0.0, **self._options)
            self._adamw.state = self.state
        by_muon = [group for group in self.param_groups if not group[BY_ADAMW]]
        self.param_groups = by_muon + (self._adamw.param_groups if self._adamw else [])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the groups are told apart as they were."""
        super().load_state_dict(state_dict)
        self._bind()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in () if group[BY_ADAMW] else group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"])
        step = _on_whole(ahead, lambda whole: orthogonal_by_heads(whole, group.get(HEADS), self._dtype))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = max(_root_mean_square(parameter), SMALLEST_SIZE) if self._relative else USUAL_SIZE
        parameter.add_(step, alpha=-group["lr"] * size * max(parameter.shape) ** 0.5)


def _root_mean_square(x: Tensor) -> float:
    """Of a whole matrix, also where each process holds a shard of it."""
    from torch.distributed.tensor import DTensor

    norm = torch.linalg.vector_norm(x, dtype=torch.float32)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(whole) / math.sqrt(x.numel())


def orthogonal_by_heads(x: Tensor, heads: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """A matrix with the singular values of each head's part made alike, or of the whole where `heads` is None.

    Args:
        x: (rows, columns).
        heads: the side that holds the heads one after the other, 0 or 1, and the width of one.
        dtype: to compute in.

    Returns:
        (rows, columns), in `dtype`, scaled so that its root mean square is what the whole matrix's would be.
    """
    if heads is None:
        return orthogonal(x[None], dtype)[0]
    side, width = heads
    turned = x if side == 0 else x.T
    parts_HDE = turned.reshape(-1, width, turned.shape[1])
    # Parts of unit singular values have a mean square of one over their longer side.
    scale = (max(parts_HDE.shape[1:]) / max(x.shape)) ** 0.5
    whole: Tensor = (orthogonal(parts_HDE, dtype) * scale).reshape(turned.shape)
    return whole if side == 0 else whole.T


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices with the same singular vectors, singular values about 1: five Newton-Schulz rounds in `dtype`.

    Args:
        x: (matrices, rows, columns).
        dtype: to compute in.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), y, beta=_A)
    return y.mT if tall else y


def _on_whole(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a whole matrix, also where each process holds a shard of it: all of them compute it."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(x, DTensor):
        return function(x).to(x.dtype)
    mesh, result = x.device_mesh, function(x.full_tensor()).to(x.dtype)
    everywhere = DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, x.placements)
