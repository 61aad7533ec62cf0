"""Convert a checkpoint: follow a plan, tensor by tensor, into a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.config_json import edit_json
from gqa_convert.checkpoint.contents import bytes_digest
from gqa_convert.checkpoint.dtypes import tensor_bytes, torch_dtype
from gqa_convert.checkpoint.flushing import Flusher
from gqa_convert.checkpoint.provenance import PROVENANCE, source_identity, versions, write_provenance
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.resolve import SAFE_INDEX
from gqa_convert.checkpoint.side_files import copy_side_file, side_file_bytes
from gqa_convert.checkpoint.staging import check_output, staged_output
from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard
from gqa_convert.conversion.card import carried_cards, read_card, write_card
from gqa_convert.conversion.operations import Operation, Pool, Solve
from gqa_convert.conversion.plan import ConvertPlan, plan
from gqa_convert.conversion.prefetch import computed_ahead, computed_together
from gqa_convert.conversion.recipe import VERIFY_LEVELS, Recipe
from gqa_convert.conversion.solve import solve_blocks, work_folder
from gqa_convert.conversion.tensors import one_thread, pooled_tensor
from gqa_convert.conversion.verify import verify_output
from gqa_convert.errors import check_choice
from gqa_convert.heads import HeadPlan
from gqa_convert.outcome import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.calibrate.report import BlockReport
    from gqa_convert.calibrate.solve import SolvedLayers

OnBytes = Callable[[int], None]
OnLayer = Callable[[str, int, int], None]
WRITERS = 2
"""Shards written at a time: one processor copies at half of what memory allows."""


@dataclass(frozen=True, kw_only=True)
class ConvertResult(Outcome):
    """A finished conversion: where it is, the plan it followed, what verifying found, and what solving reports.

    `quality` is what was measured of it, as `Quality.to_json()` gives it; None if nothing was.
    """

    out: Path
    plan: ConvertPlan
    verified: str
    checks: dict[str, Any]
    blocks: tuple[BlockReport, ...] = ()
    quality: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "out": str(self.out),
            "verified": self.verified,
            "checks": self.checks,
            "plan": self.plan.to_json(),
            "quality": self.quality,
        }


def convert(
    source: str | Path,
    *,
    groups: int | Sequence[int] | HeadPlan,
    cross_groups: int | None = None,
    keep_layers: str = "",
    tensor_parallel: int = 1,
    min_groups: int = 1,
    out: str | Path | None = None,
    method: str = "mean",
    seed: int = 0,
    recipe: Recipe | None = None,
    route: str = "auto",
    allow_slow: bool = False,
    verify: str = "structure",
    force: bool = False,
    work: str | Path | None = None,
    flush: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_bytes: OnBytes | None = None,
    on_layer: OnLayer | None = None,
) -> ConvertResult:
    """Convert a checkpoint to `groups` KV heads and write it to a new folder.

    Args:
        source: a checkpoint folder or a hub id; never written to.
        groups: KV heads after the conversion; 1 is MQA. A sequence has a number for each decoder layer.
        cross_groups: KV heads of cross-attention, for models that set them apart; as many as `groups` by default.
        keep_layers: layers that keep all their KV heads: `first,last`, `0,5`, `0-3`.
        tensor_parallel: devices that are to share the KV heads of every layer without copies.
        min_groups: KV heads that every layer is to have at least.
        out: the folder to write; by default `<source>-gqa<groups>` beside the source.
        method: a merge method by name.
        seed: for methods that draw random numbers.
        recipe: all choices about the merge at once, instead of `method` and `seed`.
        route: `native`, `remote-code` or `auto`; see `gqa_convert.conversion.plan.plan`.
        allow_slow: also convert families whose KV cache shrinks while decoding gets no faster.
        verify: `none`, `structure` (keys and shapes against the target model) or `logits` (run both models).
        force: replace an earlier conversion at `out`.
        work: folder for the solved layers of a recipe that solves any, kept for reuse; by default one beside `out`,
            resumed by the next run if this one is interrupted, and removed at the end.
        flush: wait until the disk has everything before the output takes its name. Without it a power cut soon after
            may leave an output that looks whole and is not, as with `cp`; a killed process leaves none either way.
        device: where blocks are solved and models run: `auto` (CUDA where there is one), `cpu`, `cuda:1`, ...
        dtype: what layers run in while blocks are solved: `auto` (float32), `bfloat16` or `float16`.
        trust_remote_code: allow the model's own Python code to run.
        revision: a branch, tag or commit of a hub id.
        on_bytes: called with the number of bytes written since the last call.
        on_layer: called with what is being done, the number of layers finished, and of all layers.

    Raises:
        GQAConvertError: of the kind that fits; nothing is left at `out` then.
    """
    planned = plan(
        source,
        groups=groups,
        cross_groups=cross_groups,
        keep_layers=keep_layers,
        tensor_parallel=tensor_parallel,
        min_groups=min_groups,
        out=out,
        method=method,
        seed=seed,
        recipe=recipe,
        route=route,
        allow_slow=allow_slow,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    return execute(
        planned,
        verify=verify,
        force=force,
        work=work,
        flush=flush,
        device=device,
        dtype=dtype,
        on_bytes=on_bytes,
        on_layer=on_layer,
    )


def execute(
    planned: ConvertPlan,
    *,
    verify: str = "structure",
    force: bool = False,
    work: str | Path | None = None,
    flush: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    on_bytes: OnBytes | None = None,
    on_layer: OnLayer | None = None,
) -> ConvertResult:
    """Carry a plan out. See `convert`."""
    check_choice("--verify", verify, VERIFY_LEVELS)
    checkpoint = planned.checkpoint
    side_bytes = sum(side_file_bytes(checkpoint.folder, path) for path in checkpoint.side_files)
    needed = planned.bytes_out + side_bytes + (1 << 20)
    with ExitStack() as stack:
        solved = None
        if planned.blocks is not None:
            # Solving may take hours: what would be refused at the end is refused before it.
            check_output(planned.target, force=force, source=checkpoint.folder, needed_bytes=needed)
            folder = stack.enter_context(work_folder(planned, work))
            solved = solve_blocks(planned, folder, device=device, dtype=dtype, on_layer=on_layer)
        checks = _write(planned, solved, needed, verify, force, flush, device, on_bytes)
    return ConvertResult(
        out=planned.target, plan=planned, verified=verify, checks=checks, blocks=solved.reports if solved else ()
    )


def _write(
    planned: ConvertPlan,
    solved: SolvedLayers | None,
    needed: int,
    verify: str,
    force: bool,
    flush: bool,
    device: str,
    on_bytes: OnBytes | None,
) -> dict[str, Any]:
    checkpoint = planned.checkpoint
    with staged_output(
        planned.target, force=force, source=checkpoint.folder, needed_bytes=needed, sync=flush
    ) as folder:
        digests = _write_weights(planned, solved, folder, flush, on_bytes)
        _write_config(planned, folder)
        for file in planned.anatomy.files:
            shutil.copyfile(file, folder / file.name)
        shipped = {file.name for file in planned.anatomy.files}
        _copy_side_files(checkpoint, [path for path in checkpoint.side_files if path.name not in shipped], folder)
        checks = verify_output(planned, folder, level=verify, device=device)
        record = provenance(planned, solved, digests)
        write_card(folder, record)
        write_provenance(folder / PROVENANCE, record)
    return checks


def _copy_side_files(checkpoint: Checkpoint, files: Sequence[Path], folder: Path) -> None:
    """Copy what goes along; the original's card under another name, as the output has its own."""
    cards = carried_cards(map(str, files), read_card(checkpoint.folder))
    for path in files:
        name = cards.get(str(path), str(path))
        if name:
            copy_side_file(checkpoint.folder, path, folder, name=name)


def _write_weights(
    planned: ConvertPlan, solved: SolvedLayers | None, folder: Path, flush: bool, on_bytes: OnBytes | None
) -> dict[str, str]:
    """Write the weight files, and return the digests of the solved tensors by key."""
    checkpoint = planned.checkpoint
    digests: dict[str, str] = {}
    by_shard: dict[str, list[TargetTensor]] = {shard.name: [] for shard in checkpoint.shards}
    for operation in planned.operations:
        by_shard[operation.shard].append(_target(checkpoint, operation, solved, digests))
    work = [
        partial(_write_shard, folder / shard.name, by_shard[shard.name], dict(shard.metadata))
        for shard in checkpoint.shards
        if by_shard[shard.name]
    ]
    stopped = Event()
    with one_thread(), Flusher() if flush else nullcontext() as flusher:
        tasks = [partial(write, on_bytes, flusher, stopped) for write in work]
        for path in computed_together(tasks, WRITERS, on_failure=stopped.set):
            if flusher is not None:
                flusher.flush(path)
    if len(checkpoint.shards) > 1:
        weight_map = {operation.key: operation.shard for operation in planned.operations}
        write_index(folder / SAFE_INDEX, weight_map, planned.bytes_out, planned.parameters_out)
    return dict(sorted(digests.items()))


def _target(
    checkpoint: Checkpoint, operation: Operation, solved: SolvedLayers | None, digests: dict[str, str]
) -> TargetTensor:
    """The tensor that an operation writes, and how it comes about."""
    info = checkpoint.tensors[operation.key]
    produce: Callable[[], Tensor] | None = info.load
    if isinstance(operation, Pool):
        produce = partial(pooled_tensor, checkpoint, operation)
    elif isinstance(operation, Solve):
        assert solved is not None
        produce = partial(_solved_tensor, solved, operation, digests)
    if produce is None:
        return TargetTensor.copy_of(info)
    return TargetTensor(key=operation.key, dtype=operation.dtype, shape=operation.shape, produce=produce)


def _write_shard(
    path: Path,
    targets: list[TargetTensor],
    metadata: dict[str, str],
    on_bytes: OnBytes | None,
    flusher: Flusher | None,
    stopped: Event,
) -> Path:
    """Write a shard while the tensors that must be computed for it are computed on another thread.

    Ends early once `stopped` is set: nobody waits for gigabytes that will be thrown away.
    """
    listeners = [] if on_bytes is None else [on_bytes]
    if flusher is not None:
        listeners.append(flusher.while_growing(path))

    def tell(nbytes: int) -> None:
        if stopped.is_set():
            raise CancelledError
        for listener in listeners:
            listener(nbytes)

    with computed_ahead([target.produce for target in targets if target.produce is not None]) as produced:
        stand_ins = iter(produced)
        ready = [t if t.produce is None else replace(t, produce=next(stand_ins)) for t in targets]
        write_shard(path, ready, metadata, on_bytes=tell, sync=False)
    return path


def _solved_tensor(solved: SolvedLayers, operation: Solve, digests: dict[str, str]) -> Tensor:
    tensor = solved.tensor(operation.parameter).to(torch_dtype(operation.dtype))
    digests[operation.key] = bytes_digest(tensor_bytes(tensor))
    return tensor


def _write_config(planned: ConvertPlan, folder: Path) -> None:
    removals = [("transformers_weights",)] if "transformers_weights" in planned.checkpoint.config else []
    text = edit_json(planned.checkpoint.config_text, planned.anatomy.edits, removals)
    with open(folder / "config.json", "w", encoding="utf-8", newline="") as file:
        file.write(text)


def provenance(
    planned: ConvertPlan, solved: SolvedLayers | None = None, digests: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `gqa_convert.json` says: the source's identity, the recipe, the layouts, and the versions at work.

    `digests` are those of the solved tensors, which nobody can compute again in seconds.
    """
    described = planned.to_json()
    kept = ["model_type", "class", "route", "becomes", "method", "seed", "recipe", "before", "after", "config_edits"]
    kept += [name for name in ("cross_groups", "allocation") if described[name] is not None]
    return {
        "format": 1,
        "tool": {"name": "gqa-convert", "version": installed_version("gqa-convert")},
        "source": source_identity(planned.checkpoint),
        "conversion": {key: described[key] for key in kept},
        "merged": [operation.key for operation in planned.operations if isinstance(operation, Pool)],
        "dropped": list(planned.anatomy.dropped),
        **({"solved": dict(digests)} if digests else {}),
        **({"blocks": [_block_record(report) for report in solved.reports]} if solved else {}),
        "versions": versions("torch", "transformers", "safetensors"),
    }


def _block_record(report: BlockReport) -> dict[str, Any]:
    """A block's report without its time, so that equal inputs give equal files."""
    return {key: value for key, value in report.to_json().items() if key != "seconds"}
