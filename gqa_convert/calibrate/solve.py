"""Merge and refit a whole model, a layer at a time: statistics, grouping, merge, refit, and the result to disk.

The source streams through once. For a refit the converted model streams beside it, each layer already as it will be
written, so that a layer is fitted to what it will really be given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.blocks import rotary_layouts
from gqa_convert.calibrate.layer import Merger, State, refit_layer
from gqa_convert.calibrate.moments import InputMoments
from gqa_convert.calibrate.parts import open_parts
from gqa_convert.calibrate.refit import RefitOptions
from gqa_convert.calibrate.report import BlockReport, OnLayer
from gqa_convert.calibrate.statistics_file import read_statistics, statistics_store, write_statistics
from gqa_convert.calibrate.store import LayerStore, identity
from gqa_convert.calibrate.stream import LayerStream, LayerWindow, Parts, Spill, to_device
from gqa_convert.calibrate.student import StudentParts
from gqa_convert.calibrate.tokens import batches, token_hash
from gqa_convert.calibrate.watch import BlockRecord, watching
from gqa_convert.calibrate.weights import layer_paths
from gqa_convert.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gqa_convert.anatomy.anatomy import Anatomy
    from gqa_convert.anatomy.blocks import BlockNames, Freedom
    from gqa_convert.checkpoint.reader import Checkpoint
    from gqa_convert.recipe import Recipe

    Inputs = Tensor | Mapping[str, Tensor]


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
        inputs: calibration tokens (N, T), or the arguments of forward passes by name; None for none.
        work: folder for moments and solved layers, kept; both are reused where all that they depend on is the same.
        device: where layers run and are fitted.
        dtype: of the layers while they run; float32 by default. Fitting is in float32 in any case.
        activation_bytes: activations beyond so many bytes go to mapped files in `work`; None for no limit.
        on_layer: told of the progress.

    Raises:
        UnsupportedModelError: if the model cannot be run on text, or a block is in no layer.
        CheckpointError: if the weights are not those that the configuration describes.
        OutputError: if `work` cannot be written to.
    """
    import torch

    solver = _Solver(checkpoint, anatomy, blocks, freedom, recipe, inputs, work, dtype or torch.float32, device)
    solver.spill_limit = activation_bytes
    solver.on_layer = on_layer or solver.on_layer
    return solver.run()


class _Solver:
    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        blocks: Sequence[BlockNames],
        freedom: Freedom,
        recipe: Recipe,
        inputs: Inputs | None,
        work: Path,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        import torch

        assert anatomy.difference is not None
        self.checkpoint, self.anatomy, self.recipe, self.work = checkpoint, anatomy, recipe, work
        self.dtype, self.device = dtype, torch.device(device)
        self.batches = [] if inputs is None else batches(inputs, _batch_size(inputs, recipe.refit_tokens))
        self.refit = refit_options(recipe) if inputs is not None else None
        self.layers = _by_layer(anatomy.difference.source, blocks)
        self.spill_limit: int | None = None
        self.on_layer: OnLayer = lambda what, done, total: None
        self.merger = Merger(
            recipe=recipe,
            difference=anatomy.difference,
            freedom=freedom,
            layouts=rotary_layouts(anatomy.difference.source, freedom),
            max_context=fold_context(recipe, anatomy.config),
        )
        known = {
            "source": identity(checkpoint),
            "class": anatomy.class_name,
            "text": None if inputs is None else token_hash(inputs),
            "batches": len(self.batches),
            "dtype": str(dtype),
            "layers": {path: [names.module for names in found] for path, found in self.layers.items()},
        }
        self.moments = statistics_store(work, known)
        result = {"groups": anatomy.groups, "recipe": recipe.to_json(), "freedom": asdict(freedom)}
        self.store = LayerStore(work, "layers", {**known, **result})

    def run(self) -> SolvedLayers:
        self.done = sum(self.store.has(index) for index in range(len(self.layers)))
        notes: tuple[str, ...] = ()
        if self.done < len(self.layers):
            self.on_layer("loading", self.done, len(self.layers))
            cls = type(self.merger.difference.source)
            parts, notes = open_parts(self.checkpoint, cls, self.anatomy.config, dtype=self.dtype)
            if self.refit or (self.batches and not self._all_moments()):
                self._run_layers(parts)
            else:
                self._merge_only(parts)
        return self._collected(notes)

    def _all_moments(self) -> bool:
        return all(self.moments.has(index) for index in range(len(self.layers)))

    def _merge_only(self, parts: Parts) -> None:
        for index, (path, blocks) in enumerate(self.layers.items()):
            if self.store.has(index):
                continue
            found = read_statistics(self.moments, index) if self.batches else None
            state, reports = self.merger.merge_layer(parts.load(path), path, blocks, found or {})
            parts.release(path)
            self._finish(index, state, reports)

    def _run_layers(self, parts: Parts) -> None:
        numbers = {path: index for index, path in enumerate(self.layers)}
        last = next(reversed(self.layers))
        teacher = LayerStream(parts, self.batches, device=self.device, spill=self._spill(), last=last)
        student = shadows = None
        if self.refit:
            student = StudentParts(parts, type(self.merger.difference.source), self.anatomy.target_config, self.dtype)
            shadows = LayerStream(student, self.batches, device=self.device, spill=self._spill(), last=last)
        with ExitStack() as stack:
            windows = stack.enter_context(closing(iter(teacher)))
            beside = stack.enter_context(closing(iter(shadows))) if shadows else None
            for window in windows:
                shadow = next(beside) if beside else None
                index = numbers.get(window.path)
                if index is not None:
                    self._one_layer(index, window, student, shadow)
                if shadow is not None and student is not None:
                    shadow.run()
                    student.release(shadow.path)  # or the source's old layer would live on beside its next one

    def _one_layer(
        self, index: int, window: LayerWindow, student: StudentParts | None, shadow: LayerWindow | None
    ) -> None:
        """Solve one layer, or take its result from an earlier run; either way the student holds it afterwards."""
        kept = self.store.read(index)
        if kept is not None:
            self.on_layer("resuming", self.done, len(self.layers))
            state = kept[0]
        else:
            self.on_layer("running the source", self.done, len(self.layers))
            records = self._observe(index, window)
            self.on_layer("merging", self.done, len(self.layers))
            blocks = self.layers[window.path]
            found = read_statistics(self.moments, index) or {}
            state, reports = self.merger.merge_layer(window.module, window.path, blocks, found)
            if student is not None and shadow is not None and self.refit is not None:
                student.put(state, self.device)
                fitted, seen = refit_layer(
                    blocks, records, student, shadow, self.refit, device=self.device, keep=self._keep(shadow)
                )
                state |= fitted
                reports = {module: replace(report, **asdict(seen[module])) for module, report in reports.items()}
            self._finish(index, state, reports)
        if student is not None:
            student.put(state, self.device)

    def _observe(self, index: int, window: LayerWindow) -> dict[str, BlockRecord]:
        """Run the source's layer: its moments go to their store, what a refit needs of each block is returned."""
        sums: dict[str, InputMoments] = {}
        records: dict[str, BlockRecord] = {}
        with ExitStack() as stack:
            for names in self.layers[window.path]:
                sums[names.module], records[names.module] = InputMoments(), BlockRecord()
                watch = watching(
                    window.module,
                    window.path,
                    names,
                    record=records[names.module] if self.refit else None,
                    call_arguments=False,
                    keep=self._keep(window),
                    on_inputs=None if self.moments.has(index) else sums[names.module].add,
                )
                stack.enter_context(watch)
            window.run()
        if not self.moments.has(index):
            write_statistics(self.moments, index, {module: found.statistics() for module, found in sums.items()})
        return records

    def _spill(self) -> Spill | None:
        return None if self.spill_limit is None else Spill(self.work, self.spill_limit)

    def _keep(self, window: LayerWindow) -> Callable[[Any], Any]:
        import torch

        cpu = torch.device("cpu")
        if window.spill is None:
            return lambda value: to_device(value, cpu)
        spill = window.spill
        return lambda value: spill.keep(to_device(value, cpu))

    def _finish(self, index: int, state: State, reports: Mapping[str, BlockReport]) -> None:
        self.store.write(index, state, {module: report.to_json() for module, report in reports.items()})
        self.done += 1
        self.on_layer("merging", self.done, len(self.layers))

    def _collected(self, notes: tuple[str, ...]) -> SolvedLayers:
        names: dict[str, int] = {}
        reports: list[BlockReport] = []
        for index in range(len(self.layers)):
            held, report = self.store.contents(index)
            names |= dict.fromkeys(held, index)
            reports += [BlockReport.from_json(values) for values in report.values()]
        return SolvedLayers(store=self.store, names=names, reports=tuple(reports), notes=notes)


def _batch_size(inputs: Inputs, tokens: int) -> int:
    """Windows in one call, which is also one step of a refit."""
    decoded = list(inputs.values())[-1] if isinstance(inputs, Mapping) else inputs
    return max(1, round(tokens / decoded.shape[1]))


def _by_layer(model: nn.Module, blocks: Sequence[BlockNames]) -> dict[str, list[BlockNames]]:
    """The blocks of each layer, in the model's order."""
    paths = layer_paths(model)
    found: dict[str, list[BlockNames]] = {}
    homeless = [b.module for b in blocks if not any(b.module.startswith(f"{path}.") for path in paths)]
    if homeless:
        raise UnsupportedModelError(f"{homeless[0]}: this attention is in no list of layers, so it cannot be solved.")
    for path in paths:
        inside = [b for b in blocks if b.module.startswith(f"{path}.")]
        if inside:
            found[path] = inside
    return found


def refit_options(recipe: Recipe) -> RefitOptions | None:
    """The refit that a recipe asks for; without steps it is the least squares of o_proj alone."""
    if not recipe.refit:
        return None
    return RefitOptions(
        steps=recipe.refit_steps,
        tokens=recipe.refit_tokens,
        lr=recipe.refit_lr,
        least_squares=recipe.refit_steps == 0,
        seed=recipe.seed,
    )


def fold_context(recipe: Recipe, config: Any) -> int | None:
    """The longest context that a recipe's fold keeps sound; None where it does not fold.

    Raises:
        UsageError: if it folds and neither it nor the configuration says.
    """
    if not recipe.fold:
        return None
    text = config.get_text_config(decoder=True)
    context = recipe.max_context or getattr(text, "max_position_embeddings", None)
    if not context:
        raise UsageError("--fold: the configuration states no context length. Give --max-context.")
    return int(context)
