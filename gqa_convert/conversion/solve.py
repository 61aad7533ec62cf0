"""Solve a plan's attention blocks before anything is written: text, statistics, merges, refits, layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gqa_convert.calibrate.solve import SolvedLayers
    from gqa_convert.conversion.plan import ConvertPlan

OnLayer = Callable[[str, int, int], None]


@contextmanager
def work_folder(planned: ConvertPlan, work: str | Path | None) -> Iterator[Path]:
    """Yield the folder for solved layers: the user's, kept, or one beside the target that is removed at the end.

    After an exception it stays, so that the same command goes on where it stopped.
    """
    if work is not None:
        yield Path(work).expanduser().absolute()
        return
    folder = planned.target.absolute().with_name(f".{planned.target.name}.work")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def solve_blocks(planned: ConvertPlan, work: Path, *, on_layer: OnLayer | None = None) -> SolvedLayers:
    """Carry out the part of a plan that solves whole attention blocks.

    Raises:
        GQAConvertError: of the kind that fits; finished layers stay in `work`.
    """
    import torch

    from gqa_convert.calibrate.inputs import calibration_inputs
    from gqa_convert.calibrate.solve import solve

    assert planned.blocks is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = calibration_inputs(
        planned.recipe,
        planned.anatomy.source,
        work=work,
        device=device,
        on_layer=on_layer,
    )
    return solve(
        planned.checkpoint,
        planned.anatomy,
        planned.blocks.blocks,
        planned.blocks.freedom,
        planned.recipe,
        inputs,
        work=work,
        device=device,
        on_layer=on_layer,
    )
