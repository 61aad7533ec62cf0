"""Muon for the matrices inside a model; AdamW for embeddings, output matrix, vectors and stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gqa_convert.uptrain.optim import BY_ADAMW


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimiser out of torch's two, over the same groups and the same state.

    A step of Muon is the momentum with its singular values made alike (Jordan et al. 2024), scaled to the root mean
    square of an AdamW step (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate does for both.

    Args:
        groups: as torch's optimisers take them; those with `by_adamw` true go to AdamW.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, momentum: float = 0.95
    ) -> None:
        self._options: dict[str, Any] = {"betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(groups, {"lr": 0.0, BY_ADAMW: False})
        self._bind()

    def _bind(self) -> None:
        """Make the two optimisers over this one's own groups and state."""
        options = self._options
        by_adamw = [group for group in self.param_groups if group[BY_ADAMW]]
        by_muon = [group for group in self.param_groups if not group[BY_ADAMW]]
        self._parts: list[torch.optim.Optimizer] = []
        if by_muon:
            self._parts.append(
                torch.optim.Muon(by_muon, lr=0.0, momentum=options["momentum"], adjust_lr_fn="match_rms_adamw")
            )
        if by_adamw:
            self._parts.append(torch.optim.AdamW(by_adamw, lr=0.0, betas=options["betas"], eps=options["eps"]))
        for part in self._parts:
            part.state = self.state
        self.param_groups = [group for part in self._parts for group in part.param_groups]

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
        for part in self._parts:
            part.step()
        return loss
