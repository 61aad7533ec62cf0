"""An exponential average of the trained weights, kept beside them while they are trained.

Its n-th update takes `decay` of the average and the rest of the weights; with warm-up the decay grows as
(1 + n) / (10 + n), so that the weights at the start are soon forgotten. Of a sharded model each process averages its
own shard. Averages are float32, whatever the weights are: a thousandth of a difference is lost in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gqa_convert.uptrain.state import has_average, load_average
from gqa_convert.uptrain.whole import trained_parameters

if TYPE_CHECKING:
    from gqa_convert.uptrain.config import AveragingSection


class WeightAverage:
    """The average of a model's trained parameters.

    Attributes:
        values: by the parameters' plain names, each of its parameter's shape (and sharded as it is).
        updates: how many there were.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, settings: AveragingSection) -> None:
        assert settings.decay is not None
        self._decay, self._every, self._warms_up = settings.decay, settings.every_steps, settings.warmup
        self._trained = trained_parameters(model)
        self.values: dict[str, Tensor] = {}
        self.updates = 0
        self._begin()

    def _begin(self) -> None:
        self.values = {name: p.detach().to(torch.float32, copy=True) for name, p in self._trained.items()}
        self.updates = 0

    @torch.no_grad()
    def resume(self, folder: Path, updates: object) -> bool:
        """Go on from a checkpoint; one that holds no average lets it begin with the weights as they are.

        Args:
            folder: the training checkpoint.
            updates: what its state says of them.

        Returns:
            Whether it held one.

        Raises:
            CheckpointError: if its average cannot be read, or is of other parameters.
        """
        if not has_average(folder) or not isinstance(updates, int):
            self._begin()
            return False
        load_average(folder, self.values)
        self.updates = updates
        return True

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step` (from 1), where it is one to take them in after."""
        if step % self._every:
            return
        grown = (1 + self.updates) / (10 + self.updates)
        decay = min(self._decay, grown) if self._warms_up else self._decay
        for name, parameter in self._trained.items():
            self.values[name].lerp_(parameter.detach().float(), 1.0 - decay)
        self.updates += 1

    @torch.no_grad()
    def put_in(self) -> None:
        """Make the model's parameters the average."""
        for name, parameter in self._trained.items():
            parameter.copy_(self.values[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the average for a while."""
        with torch.no_grad():
            own = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self.put_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(own[name])
