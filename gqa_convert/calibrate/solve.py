"""Merge and refit a whole model, a layer at a time: statistics, grouping, merge, refit, and the result to disk.

The source streams through once. For a refit the converted model streams beside it, each layer already as it will be
written, so that a layer is fitted to what it will really be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_convert.calibrate.report import BlockReport, OnLayer
from gqa_convert.calibrate.session import Session
from gqa_convert.calibrate.store import LayerStore

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gqa_convert.anatomy.anatomy import Anatomy
    from gqa_convert.anatomy.block_names import BlockNames, Freedom
    from gqa_convert.calibrate.tokens import Inputs
    from gqa_convert.checkpoint.reader import Checkpoint
    from gqa_convert.conversion.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SolvedLayers:
    """Every tensor of the target model that solving has made, and what is known of each block."""

    store: LayerStore
    names: dict[str, int]
    """Parameter name -> number of the layer whose file holds it."""
    reports: tuple[BlockReport, ...]
    notes: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """Read one tensor by its parameter name in the target model; float32."""
        return self.store.tensor(self.names[name], name)


def solve(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    blocks: Sequence[BlockNames],
    freedom: Freedom,
    recipe: Recipe,
    inputs: Inputs | None,
    *,
    work: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activation_bytes: int | None = None,
    on_layer: OnLayer | None = None,
) -> SolvedLayers:
    """Merge the KV heads of every block as `recipe` says, and refit each layer if it says so.

    A run that was interrupted goes on after the last layer that was finished; its result is the same bit for bit on the
    same machine. In memory: one layer of the source (and of the converted model), what lies outside the layers, and the
    activations of all calibration windows: two sets of hidden states for statistics, six for a refit (hidden states of
    both models in and out of the layer, attention inputs of the one, attention outputs of the other).

    Args:
        checkpoint: the source.
        anatomy: what depends on its KV heads, for the number of groups wanted.
        blocks: its attention blocks.
        freedom: what its architecture allows.
        recipe: method, grouping, fold, refit.
        inputs: calibration tokens (N, T), or the arguments of forward passes by name, of one or several shapes; None
            for none.
        work: folder for moments and solved layers, kept; both are reused where all that they depend on is the same.
        device: where layers run and are fitted.
        dtype: of the layers while they run; float32 by default. Fitting is in float32 in any case.
        activation_bytes: activations beyond so many bytes go to mapped files in `work`; None for half the free memory.
        on_layer: told of the progress.

    Raises:
        UnsupportedModelError: if the model cannot be run on text, or a block is in no layer.
        CheckpointError: if the weights are not those that the configuration describes.
        OutputError: if `work` cannot be written to.
    """
    import torch

    session = Session(checkpoint, anatomy, blocks, freedom, recipe, inputs, work, dtype or torch.float32, device)
    session.spill_limit = activation_bytes
    session.on_layer = on_layer or session.on_layer
    notes = session.run()
    names: dict[str, int] = {}
    reports: list[BlockReport] = []
    for index in range(len(session.layers)):
        held, report = session.store.contents(index)
        names |= dict.fromkeys(held, index)
        reports += [BlockReport.from_json(values) for values in report.values()]
    return SolvedLayers(store=session.store, names=names, reports=tuple(reports), notes=notes)
