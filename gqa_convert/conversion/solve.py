"""Solve a plan's attention blocks before anything is written: text, statistics, merges, refits, layer by layer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_convert.calibrate.store import STORES
from gqa_convert.checkpoint.dtypes import named_float
from gqa_convert.checkpoint.staging import check_apart, sibling
from gqa_convert.errors import OutputError
from gqa_convert.hf.loading import pick_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gqa_convert.calibrate.solve import SolvedLayers
    from gqa_convert.conversion.plan import ConvertPlan

OnLayer = Callable[[str, int, int], None]

COSTS = re.compile(r"costs-[0-9a-f]{16}\.json")
"""Names of the files that measured costs of single layers are kept in."""


@contextmanager
def work_folder(planned: ConvertPlan, work: str | Path | None) -> Iterator[Path]:
    """Yield the folder for solved layers: the user's, kept, or one beside the target that is removed at the end.

    After an exception it stays, so that the same command goes on where it stopped. Only what is ours is removed: the
    stores, and the folder if nothing else is in it.

    Raises:
        OutputError: if the user's folder is the source or the output, or lies in one of them.
    """
    if work is not None:
        folder = Path(os.path.abspath(os.path.expanduser(work)))
        check_apart(folder, planned.checkpoint.folder, "--work")
        target = os.path.realpath(planned.target)
        if Path(os.path.realpath(folder)).is_relative_to(target):
            raise OutputError(f"{folder}: lies in the output, which must not exist before. Choose another --work.")
        yield folder
        return
    folder = sibling(Path(os.path.abspath(planned.target)), "work")
    yield folder
    with suppress(OSError):
        for store in list(folder.iterdir()):
            if store.is_symlink():
                continue
            if STORES.fullmatch(store.name):
                shutil.rmtree(store, ignore_errors=True)
            elif COSTS.fullmatch(store.name):
                store.unlink()
        folder.rmdir()


def solve_blocks(
    planned: ConvertPlan, work: Path, *, device: str = "auto", dtype: str = "auto", on_layer: OnLayer | None = None
) -> SolvedLayers:
    """Carry out the part of a plan that solves whole attention blocks; `device` and `dtype` are those of `convert`.

    Raises:
        GQAConvertError: of the kind that fits; finished layers stay in `work`.
    """
    from gqa_convert.calibrate.inputs import calibration_inputs
    from gqa_convert.calibrate.solve import solve

    assert planned.blocks is not None
    chosen = pick_device(device)
    inputs = calibration_inputs(
        planned.recipe,
        planned.anatomy.source,
        work=work,
        device=str(chosen),
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
        device=chosen,
        dtype=None if dtype == "auto" else named_float(dtype),
        on_layer=on_layer,
    )
