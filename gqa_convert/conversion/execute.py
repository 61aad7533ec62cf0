"""Convert a checkpoint: follow a plan, tensor by tensor, into a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.config_json import edit_json
from gqa_convert.checkpoint.flushing import Flusher
from gqa_convert.checkpoint.provenance import PROVENANCE, source_identity, write_provenance
from gqa_convert.checkpoint.safetensors_file import torch_dtype
from gqa_convert.checkpoint.side_files import copy_side_file, side_file_bytes
from gqa_convert.checkpoint.staging import check_output, staged_output
from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard
from gqa_convert.conversion.plan import ConvertPlan, plan
from gqa_convert.conversion.prefetch import computed_ahead, computed_together
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.conversion.solve import solve_blocks, work_folder
from gqa_convert.conversion.tensors import merged_tensor, one_thread
from gqa_convert.conversion.verify import verify_output
from gqa_convert.errors import UsageError
from gqa_convert.merge.registry import get_method

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.calibrate.report import BlockReport
    from gqa_convert.calibrate.solve import SolvedLayers

OnBytes = Callable[[int], None]
OnLayer = Callable[[str, int, int], None]
VERIFY_LEVELS = ("none", "structure", "logits")
WRITERS = 2
"""Shards written at a time: one processor copies at half of what memory allows."""
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """A finished conversion: where it is, the plan it followed, what verifying found, and what solving reports."""

    out: Path
    plan: ConvertPlan
    verified: str
    checks: dict[str, Any]
    blocks: tuple[BlockReport, ...] = ()


def convert(
    source: str | Path,
    *,
    groups: int,
    cross_groups: int | None = None,
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
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_bytes: OnBytes | None = None,
    on_layer: OnLayer | None = None,
) -> ConvertResult:
    """Convert a checkpoint to `groups` KV heads and write it to a new folder.

    Args:
        source: a checkpoint folder or a hub id; never written to.
        groups: KV heads after the conversion; 1 is MQA.
        cross_groups: KV heads of cross-attention, for models that set them apart; as many as `groups` by default.
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
        trust_remote_code: allow the model's own Python code to run.
        revision: a branch, tag or commit of a hub id.
        on_bytes: called with the number of bytes written since the last call.
        on_layer: called with what is being done, the number of layers finished, and of all layers.

    Raises:
        GQAConvertError: of the kind that fits; nothing is left at `out` then.
    """
    made = plan(
        source,
        groups=groups,
        cross_groups=cross_groups,
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
        made,
        verify=verify,
        force=force,
        work=work,
        flush=flush,
        trust_remote_code=trust_remote_code,
        on_bytes=on_bytes,
        on_layer=on_layer,
    )


def execute(
    made: ConvertPlan,
    *,
    verify: str = "structure",
    force: bool = False,
    work: str | Path | None = None,
    flush: bool = True,
    trust_remote_code: bool = False,
    on_bytes: OnBytes | None = None,
    on_layer: OnLayer | None = None,
) -> ConvertResult:
    """Carry a plan out. See `convert`."""
    if verify not in VERIFY_LEVELS:
        raise UsageError(f"--verify {verify}: choose one of {', '.join(VERIFY_LEVELS)}.")
    checkpoint = made.checkpoint
    side_bytes = sum(side_file_bytes(checkpoint.folder, path) for path in checkpoint.side_files)
    needed = made.bytes_out + side_bytes + (1 << 20)
    with ExitStack() as stack:
        solved = None
        if made.blocks is not None:
            # Solving may take hours: what would be refused at the end is refused before it.
            check_output(made.target, force=force, source=checkpoint.folder, needed_bytes=needed)
            folder = stack.enter_context(work_folder(made, work))
            solved = solve_blocks(made, folder, trust_remote_code=trust_remote_code, on_layer=on_layer)
        checks = _write(made, solved, needed, verify, force, flush, trust_remote_code, on_bytes)
    return ConvertResult(
        out=made.target, plan=made, verified=verify, checks=checks, blocks=solved.reports if solved else ()
    )


def _write(
    made: ConvertPlan,
    solved: SolvedLayers | None,
    needed: int,
    verify: str,
    force: bool,
    flush: bool,
    trust_remote_code: bool,
    on_bytes: OnBytes | None,
) -> dict[str, Any]:
    checkpoint = made.checkpoint
    with staged_output(made.target, force=force, source=checkpoint.folder, needed_bytes=needed, sync=flush) as folder:
        _write_weights(made, solved, folder, flush, on_bytes)
        _write_config(made, folder)
        for file in made.anatomy.files:
            shutil.copyfile(file, folder / file.name)
        for path in checkpoint.side_files:
            if path.name in {file.name for file in made.anatomy.files}:
                continue
            copy_side_file(checkpoint.folder, path, folder)
        checks = verify_output(made, folder, level=verify, trust_remote_code=trust_remote_code)
        write_provenance(folder / PROVENANCE, provenance(made, solved))
    return checks


def _write_weights(
    made: ConvertPlan, solved: SolvedLayers | None, folder: Path, flush: bool, on_bytes: OnBytes | None
) -> None:
    checkpoint = made.checkpoint
    method = get_method(made.method)
    merges = {merge.key: merge for merge in made.anatomy.merges}
    names = {raw_key: name for name, raw_key in made.blocks.keys.items()} if made.blocks else {}
    dropped = set(made.anatomy.dropped)
    weight_map: dict[str, str] = {}
    work = []
    for shard in checkpoint.shards:
        targets = []
        for key, info in shard.tensors.items():
            if key in dropped:
                continue
            weight_map[key] = shard.name
            merge = merges.get(key)
            if solved is not None and key in names:
                shape = merge.target_shape if merge else info.shape
                made_there = partial(_solved_tensor, solved, names[key], info.dtype)
                targets.append(TargetTensor(key=key, dtype=info.dtype, shape=shape, produce=made_there))
            elif merge is None and info.load is not None:
                targets.append(TargetTensor(key=key, dtype=info.dtype, shape=info.shape, produce=info.load))
            elif merge is None:
                targets.append(TargetTensor.copy_of(info))
            else:
                produce = partial(merged_tensor, checkpoint, merge, method, made.seed)
                targets.append(TargetTensor(key=key, dtype=info.dtype, shape=merge.target_shape, produce=produce))
        if targets:
            work.append(partial(_write_shard, folder / shard.name, targets, dict(shard.metadata)))
    stopped = Event()
    with one_thread(), Flusher() if flush else nullcontext() as flusher:
        tasks = [partial(write, on_bytes, flusher, stopped) for write in work]
        for path in computed_together(tasks, WRITERS, on_failure=stopped.set):
            if flusher is not None:
                flusher.flush(path)
    if len(checkpoint.shards) > 1:
        write_index(folder / _INDEX, weight_map, made.bytes_out, made.parameters_out)


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

    with computed_ahead([target.produce for target in targets if target.produce is not None]) as made:
        stand_ins = iter(made)
        ready = [t if t.produce is None else replace(t, produce=next(stand_ins)) for t in targets]
        write_shard(path, ready, metadata, on_bytes=tell, sync=False)
    return path


def _solved_tensor(solved: SolvedLayers, name: str, dtype: str) -> Tensor:
    return solved.tensor(name).to(torch_dtype(dtype))


def _write_config(made: ConvertPlan, folder: Path) -> None:
    removals = [("transformers_weights",)] if "transformers_weights" in made.checkpoint.config else []
    text = edit_json(made.checkpoint.config_text, made.anatomy.edits, removals)
    with open(folder / "config.json", "w", encoding="utf-8", newline="") as file:
        file.write(text)


def provenance(made: ConvertPlan, solved: SolvedLayers | None = None) -> dict[str, Any]:
    """What `gqa_convert.json` says: the source's identity, the recipe, the layouts, and the versions at work."""
    described = made.to_json()
    kept = ["model_type", "class", "route", "becomes", "method", "seed", "recipe", "before", "after", "config_edits"]
    kept += ["cross_groups"] if described["cross_groups"] is not None else []
    return {
        "format": 1,
        "tool": {"name": "gqa-convert", "version": installed_version("gqa-convert")},
        "source": source_identity(made.checkpoint),
        "conversion": {key: described[key] for key in kept},
        "merged": [merge.key for merge in made.anatomy.merges],
        "dropped": list(made.anatomy.dropped),
        **({"blocks": [_block_record(report) for report in solved.reports]} if solved else {}),
        "versions": {name: installed_version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _block_record(report: BlockReport) -> dict[str, Any]:
    """A block's report without its time, so that equal inputs give equal files."""
    return {key: value for key, value in report.to_json().items() if key != "seconds"}
