"""One layer: group and merge the heads of its attention blocks, then refit them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.block_names import BlockNames, Freedom
from gqa_convert.anatomy.blocks import block_state, layout_for, read_block
from gqa_convert.anatomy.extras import moved_extras
from gqa_convert.calibrate.activations import to_device
from gqa_convert.calibrate.hooks import BlockRecord, Enough, part_of, watching
from gqa_convert.calibrate.paused_forward import LayerCall
from gqa_convert.calibrate.refit import RefitOptions, RefitReport, refit_block
from gqa_convert.calibrate.report import BlockReport
from gqa_convert.calibrate.residual import hidden_of, residual_scale
from gqa_convert.checkpoint.dtypes import not_finite
from gqa_convert.errors import CheckpointError
from gqa_convert.heads import Grouping
from gqa_convert.merge.apply import merge_block, method_options
from gqa_convert.merge.grouping import residual_cost, search_grouping
from gqa_convert.merge.moments import block_moments
from gqa_convert.merge.options import MergeOptions
from gqa_convert.merge.registry import get_method, plain_method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gqa_convert.anatomy.shapes import ShapeDifference
    from gqa_convert.calibrate.descent import Call
    from gqa_convert.calibrate.layer_stream import LayerWindow
    from gqa_convert.calibrate.parts import StudentParts
    from gqa_convert.conversion.recipe import Recipe
    from gqa_convert.merge.block import AttentionBlock, RotaryLayout
    from gqa_convert.merge.statistics import Statistics

State = dict[str, "Tensor"]
"""Tensors by parameter name of the whole model."""


@dataclass(frozen=True, kw_only=True)
class Merger:
    """Merges blocks as one recipe says."""

    recipe: Recipe
    difference: ShapeDifference
    freedom: Freedom
    layouts: Mapping[str, RotaryLayout]
    max_context: int | None
    """Longest context that a fold keeps sound, if the recipe folds."""

    @cached_property
    def _merged(self) -> frozenset[str]:
        """Parameters that a merge makes smaller or drops."""
        return frozenset(self.difference.rows) | frozenset(self.difference.stacks)

    def merge_layer(
        self, layer: nn.Module, path: str, blocks: Sequence[BlockNames], statistics: Mapping[str, Statistics]
    ) -> tuple[State, dict[str, BlockReport]]:
        """Return every tensor of one layer that depends on KV heads or moves with them, and a report per block.

        Raises:
            CheckpointError: if a weight of the layer, or a statistic of what goes into it, is not finite.
        """
        tensors = {f"{path}.{name}": tensor.cpu() for name, tensor in layer.state_dict().items()}
        _check_finite(tensors, path, statistics)
        state: State = {}
        reports = {}
        for names in blocks:
            started = time.monotonic()
            rotary = layout_for(names, self.difference.source, self.layouts)
            block = read_block(tensors.get, names, self.freedom, rotary)
            seen = statistics.get(names.module)
            merged, report = self._merge(names, block, None if seen is None else seen.steadied)
            state |= {name: tensor.float() for name, tensor in block_state(names, merged).items()}
            if self.recipe.grouping == "search" and self.freedom.moves(names):
                grouping = Grouping(report.grouping)
                moved = moved_extras(
                    tensors.get, names, self.freedom.extras, block.query_order(grouping), grouping.order
                )
                tensors |= moved  # those of KV heads are merged below, in their new order
                state |= {name: tensor.float() for name, tensor in moved.items() if name not in self._merged}
            reports[names.module] = replace(report, seconds=time.monotonic() - started)
        state |= other_state(self.difference, tensors.get, path, state)
        return state, reports

    def _merge(
        self, names: BlockNames, block: AttentionBlock, statistics: Statistics | None
    ) -> tuple[AttentionBlock, BlockReport]:
        method = get_method(self.recipe.method)
        options = method_options(
            method, MergeOptions(max_context=self.max_context, seed=self.recipe.seed, key=names.module)
        )
        grouping = Grouping.contiguous(block.num_kv_heads, names.groups)
        search = (
            self.recipe.grouping == "search" and self.freedom.moves(names) and 1 < names.groups < block.num_kv_heads
        )
        moments = block_moments(block, statistics, options) if search or method.maps is not None else None
        if search and moments is not None:
            measure = plain_method() if method.draws else method
            cost = residual_cost(measure, [moments], options)
            grouping = search_grouping(block.num_kv_heads, names.groups, cost, seed=self.recipe.seed).grouping
        merged = merge_block(method, block, grouping, statistics, options, moments=moments)
        report = BlockReport(
            module=names.module,
            grouping=grouping.members,
            key_residual=merged.report.key_residual,
            value_residual=merged.report.value_residual,
        )
        return merged.block, report


def _check_finite(tensors: Mapping[str, Tensor], path: str, statistics_of: Mapping[str, Statistics]) -> None:
    """Refuse what no merge can be computed from, before a decomposition fails on it."""
    for name, tensor in tensors.items():
        wrong = not_finite(tensor)
        if wrong:
            raise CheckpointError(
                f"{name}: {wrong:,} of {tensor.numel():,} values are not finite (NaN or infinity), so {path} cannot be "
                "merged. Repair or re-download the checkpoint."
            )
    for module, statistics in statistics_of.items():
        if not_finite(statistics.moment):
            raise CheckpointError(
                f"{module}: what goes into it when the model reads the calibration text is not finite (NaN, infinity). "
                "A weight before it is damaged, or its numbers overflow."
            )


def refit_layer(
    blocks: Sequence[BlockNames],
    records: Mapping[str, BlockRecord],
    source: LayerWindow,
    student: StudentParts,
    shadow: LayerWindow,
    options: RefitOptions,
    *,
    keep: Callable[[Any], Any],
    progress: Callable[[int], None] | None = None,
) -> tuple[State, dict[str, RefitReport]]:
    """Refit the blocks of one layer, in order, and put the results into the student, which holds the merged ones.

    Args:
        blocks: the blocks.
        records: the outputs of each block of the source.
        source: the source's calls of the layer.
        student: the converted model, with this layer loaded.
        shadow: the student's calls of the layer.
        options: see `RefitOptions`.
        keep: what is done to activations that are kept.
        progress: called with the number of steps done since the last call.
    """
    state: State = {}
    reports = {}
    for names in blocks:
        started = time.monotonic()
        targets: Sequence[Tensor] = records[names.module].outputs
        if options.least_squares and not options.steps:
            targets = corrected(targets, source, shadow, names)
        module = part_of(student.model, "", names.module)
        calls = attention_calls(shadow, names, keep)
        fitted, report = refit_block(
            module, names.module, names, calls, targets, options, device=shadow.device, progress=progress
        )
        student.put(fitted, shadow.device)
        state |= fitted
        reports[names.module] = replace(report, seconds=time.monotonic() - started)
    return state, reports


def corrected(
    targets: Sequence[Tensor], source: LayerWindow, shadow: LayerWindow, names: BlockNames
) -> Sequence[Tensor]:
    """Add to each target what the student's stream already lacks, where attention enters the stream as a plain sum.

    This helps a least squares, which can do little else about the error. A descent gains little by it: deep in a model
    most of the lack cannot be told from what the block sees (docs/merging.md, making up for earlier layers).
    """
    call = source.calls[0]
    args, kwargs = to_device((call.args, call.kwargs), source.device)
    scale = residual_scale(source.module, source.path, names, LayerCall(call.path, args, kwargs))
    if scale is None:
        return targets
    lacks = zip(map(hidden_of, source.calls), map(hidden_of, shadow.calls), strict=True)
    return [y if h is None or s is None else y + (h - s) / scale for y, (h, s) in zip(targets, lacks, strict=True)]


def attention_calls(window: LayerWindow, names: BlockNames, keep: Callable[[Any], Any] | None = None) -> list[Call]:
    """Run a layer's calls as far as one of its attention blocks, and return what that is given."""
    import torch

    own = BlockRecord()
    watch = watching(window.module, window.path, names, record=own, keep=keep, stop=True)
    with watch, torch.no_grad(), window.computing():
        for call in window.calls:
            args, kwargs = to_device((call.args, call.kwargs), window.device)
            with suppress(Enough):
                window.module(*args, **kwargs)
    return own.calls


def other_state(
    difference: ShapeDifference, get: Callable[[str], Tensor | None], path: str, solved: Iterable[str]
) -> dict[str, Tensor]:
    """Return the merged tensors of one layer that belong to no block, by parameter name, in float32.

    Args:
        difference: what depends on KV heads.
        get: the source's parameters by name.
        path: the layer.
        solved: names that are already dealt with.
    """
    import torch

    pool = plain_method().pool
    assert pool is not None
    done, state = set(solved), {}
    for name, rows in difference.rows.items():
        source = get(name) if name.startswith(f"{path}.") and name not in done else None
        if source is not None:
            state[name] = rows.merge(source.detach().float(), pool)
    for name, stack in difference.stacks.items():
        if name.startswith(f"{path}.") and name in difference.target_shapes:
            index, size = difference.stack_of(name)
            members = [get(other) for other in stack[index * size : (index + 1) * size]]
            state[name] = torch.stack([m.detach().float() for m in members if m is not None]).mean(0)
    return state
