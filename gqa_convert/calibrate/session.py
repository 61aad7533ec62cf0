"""One run over the layers of a model: what is finished is taken from disk, the rest is solved and put there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.blocks import rotary_layouts
from gqa_convert.budget.machine import free_memory
from gqa_convert.calibrate.activations import Spill, to_device
from gqa_convert.calibrate.attention_received import Attended, attention_received
from gqa_convert.calibrate.hooks import BlockRecord, part_of, watching
from gqa_convert.calibrate.input_statistics import InputMoments, read_statistics, statistics_store, write_statistics
from gqa_convert.calibrate.layer import Merger, State, refit_layer
from gqa_convert.calibrate.layer_stream import LayerStream, LayerWindow, Parts
from gqa_convert.calibrate.parts import StudentParts, open_parts
from gqa_convert.calibrate.refit import RefitOptions, RefitReport
from gqa_convert.calibrate.report import BlockReport, OnLayer
from gqa_convert.calibrate.store import LayerStore, identity
from gqa_convert.calibrate.tokens import batches, token_hash
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.hf.loading import max_positions
from gqa_convert.hf.partial import layer_paths

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gqa_convert.anatomy.anatomy import Anatomy
    from gqa_convert.anatomy.block_names import BlockNames, Freedom
    from gqa_convert.calibrate.tokens import Inputs
    from gqa_convert.checkpoint.reader import Checkpoint
    from gqa_convert.conversion.recipe import Recipe

_TEXT_FIELDS = ("calibrate", "sequences", "length")  # of a recipe: the text's own hash says more
_TOLD_EVERY = 10  # steps


class Session:
    """See `gqa_convert.calibrate.solve.solve`, whose arguments these are."""

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
        self.batches = [] if inputs is None else batches(inputs, lambda parts: batch_size(parts, recipe.refit_tokens))
        self.batches = [
            {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in parts.items()}
            for parts in self.batches
        ]
        self.refit = refit_options(recipe) if inputs is not None else None
        self.layers = blocks_by_layer(anatomy.difference.source, blocks)
        self.spill_limit: int | None = None
        self.on_layer: OnLayer = lambda what, done, total: None
        self.merger = Merger(
            recipe=recipe,
            difference=anatomy.difference,
            freedom=freedom,
            layouts=rotary_layouts(anatomy.difference.source, freedom),
            max_context=None if freedom.rotary_kind == "none" else fold_context(recipe, anatomy.config),
        )
        known = {
            "source": identity(checkpoint),
            "class": anatomy.class_name,
            "text": None if inputs is None else token_hash(inputs),
            "batches": len(self.batches),
            "dtype": str(dtype),
            "layers": {path: [names.module for names in blocks] for path, blocks in self.layers.items()},
        }
        self.moments = statistics_store(work, {**known, "tokens": "by the attention received"})
        chosen = {name: value for name, value in recipe.to_json().items() if name not in _TEXT_FIELDS}
        groups = anatomy.groups if isinstance(anatomy.groups, int) else anatomy.groups.counts
        result = {"groups": groups, "recipe": chosen, "freedom": asdict(freedom)}
        self.store = LayerStore(work, "layers", {**known, **result})
        self.alike: list[str] = []

    def run(self) -> tuple[str, ...]:
        """Finish every layer, and return notes on how it was done."""
        self.done = sum(self.store.has(index) for index in range(len(self.layers)))
        notes: tuple[str, ...] = ()
        if self.done < len(self.layers):
            self.on_layer("loading", self.done, len(self.layers))
            parts, notes = open_parts(self.anatomy.source, dtype=self.dtype)
            if self.refit or (self.batches and not self._all_moments()):
                self._run_layers(parts)
                notes += self._unreached() + self._counted_alike()
            self._merge_only(parts)
        return notes

    def _unreached(self) -> tuple[str, ...]:
        left = [path for index, path in enumerate(self.layers) if not self.store.has(index)]
        return (f"{', '.join(left)}: not run on text, so merged without statistics or refit",) if left else ()

    def _counted_alike(self) -> tuple[str, ...]:
        left = self.alike
        return (
            (f"{', '.join(left)}: attention weights not seen, so all calibration tokens count alike",) if left else ()
        )

    def _all_moments(self) -> bool:
        return all(self.moments.has(index) for index in range(len(self.layers)))

    def _merge_only(self, parts: Parts) -> None:
        for index, (path, blocks) in enumerate(self.layers.items()):
            if self.store.has(index):
                continue
            statistics = read_statistics(self.moments, index) or {}
            state, reports = self.merger.merge_layer(parts.load(path), path, blocks, statistics)
            parts.release(path)
            self._finish(index, state, reports)

    def _run_layers(self, parts: Parts) -> None:
        numbers = {path: index for index, path in enumerate(self.layers)}
        last = next(reversed(self.layers))
        teacher = self._stream(parts, last)
        student = shadows = None
        if self.refit:
            target_class = type(self.anatomy.target_model)
            student = StudentParts(parts, target_class, self.anatomy.target_config, self.dtype)
            shadows = self._stream(student, last)
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

    def _stream(self, parts: Parts, last: str) -> LayerStream:
        return LayerStream(parts, self.batches, device=self.device, spill=self._spill(), quick=True, last=last)

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
            statistics = read_statistics(self.moments, index) or {}
            state, reports = self.merger.merge_layer(window.module, window.path, blocks, statistics)
            if student is not None and shadow is not None and self.refit is not None:
                student.put(state, self.device)
                fitted, seen = refit_layer(
                    blocks,
                    records,
                    window,
                    student,
                    shadow,
                    self.refit,
                    keep=self._keep(shadow),
                    progress=self._steps(len(blocks)),
                )
                state |= fitted
                reports = {module: _with_refit(report, seen[module]) for module, report in reports.items()}
            self._finish(index, state, reports)
        if student is not None:
            student.put(state, self.device)

    def _observe(self, index: int, window: LayerWindow) -> dict[str, BlockRecord]:
        """Run the source's layer: its moments go to their store, what a refit needs of each block is returned."""
        sums: dict[str, InputMoments] = {}
        records: dict[str, BlockRecord] = {}
        blocks = {names: part_of(window.module, window.path, names.module) for names in self.layers[window.path]}
        known = self.moments.has(index)
        with ExitStack() as stack:
            attended = None if known else stack.enter_context(attention_received(blocks.values()))
            for names, module in blocks.items():
                sums[names.module], records[names.module] = InputMoments(), BlockRecord()
                watch = watching(
                    window.module,
                    window.path,
                    names,
                    record=records[names.module] if self.refit else None,
                    call_arguments=False,
                    keep=self._keep(window),
                    on_inputs=None if attended is None else self._adding(sums[names.module], attended, module, names),
                )
                stack.enter_context(watch)
            window.run()
        if not known:
            write_statistics(
                self.moments, index, {module: collected.statistics() for module, collected in sums.items()}
            )
        return records

    def _adding(
        self, sums: InputMoments, attended: Attended, module: nn.Module, names: BlockNames
    ) -> Callable[[Tensor, Tensor], None]:
        def add(query: Tensor, kv: Tensor) -> None:
            received = attended.take(module)
            if received is None and names.module not in self.alike:
                self.alike.append(names.module)
            sums.add(query, kv, received)

        return add

    def _steps(self, blocks: int) -> Callable[[int], None]:
        """Count the steps of one layer's refit, of all its blocks."""
        assert self.refit is not None
        total, done = self.refit.steps * blocks, 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            if done % _TOLD_EVERY == 0:
                self.on_layer(f"refitting, step {done} of {total}", self.done, len(self.layers))

        return progress

    def _spill(self) -> Spill | None:
        budget = self.spill_limit
        if budget is None:
            budget = free_memory() // 2
        return Spill(self.work, budget // 4)  # two streams, each with what goes into a layer and what comes out

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


def _with_refit(report: BlockReport, seen: RefitReport) -> BlockReport:
    return replace(report, **{**asdict(seen), "seconds": report.seconds + seen.seconds})


def batch_size(inputs: Mapping[str, Tensor], tokens: int) -> int:
    """Return the windows of one call, which is also one step of a refit of `tokens` tokens."""
    decoded = inputs.get("decoder_input_ids", next(iter(inputs.values())))
    if len(inputs) > 1 and "input_ids" not in inputs:
        return 1  # of sound: the encoder has work enough with one window
    return max(1, round(tokens / decoded.shape[1]))


def blocks_by_layer(model: nn.Module, blocks: Sequence[BlockNames]) -> dict[str, list[BlockNames]]:
    """Return the blocks of each layer by its path, in the model's order.

    Raises:
        UnsupportedModelError: if a block is in no layer.
    """
    paths = layer_paths(model)
    by_layer: dict[str, list[BlockNames]] = {}
    homeless = [b.module for b in blocks if not any(b.module.startswith(f"{path}.") for path in paths)]
    if homeless:
        raise UnsupportedModelError(f"{homeless[0]}: this attention is in no list of layers, so it cannot be solved.")
    for path in paths:
        inside = [b for b in blocks if b.module.startswith(f"{path}.")]
        if inside:
            by_layer[path] = inside
    return by_layer


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
    context = recipe.max_context or max_positions(config)
    if not context:
        raise UsageError("--fold: the configuration states no context length. Give --max-context.")
    return context
