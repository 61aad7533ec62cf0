"""Solve a plan's attention blocks before anything is written: text, statistics, merges, refits, layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.recipe import SELF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gqa_convert.calibrate.solve import SolvedLayers
    from gqa_convert.planning import ConvertPlan

OnLayer = Callable[[str, int, int], None]


@contextmanager
def work_folder(made: ConvertPlan, work: str | Path | None) -> Iterator[Path]:
    """Yield the folder for solved layers: the user's, kept, or one beside the target that is removed at the end.

    After an exception it stays, so that the same command goes on where it stopped.
    """
    if work is not None:
        yield Path(work).expanduser().absolute()
        return
    folder = made.target.absolute().with_name(f".{made.target.name}.work")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def solve_blocks(
    made: ConvertPlan, work: Path, *, trust_remote_code: bool = False, on_layer: OnLayer | None = None
) -> SolvedLayers:
    """Carry out the part of a plan that solves whole attention blocks.

    Raises:
        GQAConvertError: of the kind that fits; finished layers stay in `work`.
    """
    import torch

    from gqa_convert.calibrate.solve import solve

    assert made.blocks is not None
    return solve(
        made.checkpoint,
        made.anatomy,
        made.blocks.blocks,
        made.blocks.freedom,
        resolved_recipe(made),
        calibration_inputs(made, work, trust_remote_code=trust_remote_code, on_layer=on_layer),
        work=work,
        device="cuda" if torch.cuda.is_available() else "cpu",
        on_layer=on_layer,
    )


def resolved_recipe(made: ConvertPlan) -> Any:
    """The recipe with the longest context that a fold must keep sound filled in from the configuration."""
    from dataclasses import replace

    recipe = made.recipe
    if not recipe.fold or recipe.max_context is not None:
        return recipe
    return replace(recipe, max_context=context_length(made))


def context_length(made: ConvertPlan) -> int | None:
    """The longest context the configuration speaks of; None where it names none."""
    config = made.anatomy.config
    for owner in (config, config.get_text_config(decoder=True)):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def calibration_inputs(
    made: ConvertPlan, work: Path, *, trust_remote_code: bool, on_layer: OnLayer | None
) -> Tensor | None:
    """Return the recipe's calibration tokens, (N, T); sampled ones are kept in `work` for a rerun.

    Raises:
        GQAConvertError: if the text cannot be had or is too short for one window.
    """
    from gqa_convert.calibrate.tokens import calibration_tokens, window_plan

    recipe = made.recipe
    if recipe.calibrate is None:
        return None
    sequences, length = window_plan(context_length(made), sequences=recipe.sequences, length=recipe.length)
    if recipe.calibrate != SELF:
        return calibration_tokens(
            recipe.calibrate,
            made.source,
            sequences=sequences,
            length=length,
            seed=recipe.seed,
            trust_remote_code=trust_remote_code,
        )
    return _self_text(made, work, sequences, length, trust_remote_code, on_layer)


def _self_text(
    made: ConvertPlan, work: Path, sequences: int, length: int, trust_remote_code: bool, on_layer: OnLayer | None
) -> Tensor:
    import torch
    from safetensors.torch import load_file, save_file

    from gqa_convert.calibrate.self_text import self_tokens
    from gqa_convert.calibrate.store import identity

    wanted = {"source": str(identity(made.checkpoint)), "shape": f"{sequences}x{length}", "seed": str(made.recipe.seed)}
    kept = work / "self_text.safetensors"
    if kept.is_file() and _metadata(kept) == wanted:
        return load_file(kept)["tokens"]
    written = 0

    def count(windows: int) -> None:
        nonlocal written
        written += windows
        if on_layer is not None:
            on_layer("sampling text from the model", written, sequences)

    tokens = self_tokens(
        made.source,
        sequences=sequences,
        length=length,
        seed=made.recipe.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        trust_remote_code=trust_remote_code,
        progress=count,
    )
    work.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    save_file({"tokens": tokens}, partial, metadata=wanted)
    partial.replace(kept)
    return tokens


def _metadata(path: Path) -> dict[str, str]:
    from gqa_convert.checkpoint.safetensors_file import read_header

    return read_header(path)[1]
