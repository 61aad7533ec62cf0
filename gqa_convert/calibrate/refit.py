"""Local refit of one merged attention block against its original: no language-model training, one layer at a time.

The block is given what the converted model will really feed it, its earlier layers being refitted already, and fitted
to what the original block gave in the source. Two steps, either or both: its q, k, v and o are trained (`descent`), and
its o projection is solved for (`least_squares`). Both measure on windows that they do not fit, and keep what they
started from where they cannot better it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.activations import to_device
from gqa_convert.calibrate.descent import DescentOptions, as_float32, descend, held_out
from gqa_convert.calibrate.hooks import Names, part_of, watching
from gqa_convert.calibrate.least_squares import NormalEquations
from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gqa_convert.calibrate.descent import Call


@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """How merged layers are refitted.

    Raises:
        UsageError: for values that mean nothing.
    """

    steps: int = 300
    """Optimiser steps per layer; 0 leaves the descent out."""
    tokens: int = 2048
    """Calibration tokens per step."""
    lr: float | None = None
    """Peak learning rate; by default each tensor's own, from the size of its elements."""
    least_squares: bool = False
    """Solve for o_proj afterwards."""
    damping: float = 1e-3
    """Pull of the least squares towards the o_proj they start from."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.steps < 0:
            problems.append(f"steps={self.steps}: must not be negative")
        if self.tokens < 1:
            problems.append(f"tokens={self.tokens}: must be at least 1")
        if self.lr is not None and not 0 < self.lr < 1:
            problems.append(f"lr={self.lr}: must lie between 0 and 1")
        if self.damping <= 0:
            problems.append(f"damping={self.damping}: must be positive")
        if problems:
            raise UsageError(f"refit: {'; '.join(problems)}.")


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    """Mean square error of one block on held-out windows, as a share of the mean square of what it should have given.

    Measured on what the converted model feeds the block. None for a step that was left out.
    """

    error_before: float
    error_after_descent: float | None
    error_after_least_squares: float | None
    error_on_fitted: float | None = None
    """The same on the windows that the descent was fitted to, as it ended."""
    seconds: float = 0.0


def refit_block(
    module: nn.Module,
    path: str,
    names: Names,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    options: RefitOptions,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], RefitReport]:
    """Refit a copy of a merged attention module, and return its q, k, v and o by parameter name, in float32.

    Args:
        module: the attention module with the merged weights; left as it is.
        path: its path in the model.
        names: the block.
        calls: the module's arguments, an entry a step.
        targets: the original o projection's output for each, (B, T, X).
        options: see `RefitOptions`.
        device: where to compute.
        progress: called with the number of steps done since the last call.
    """
    import torch

    work = deepcopy(module).to(device=device, dtype=torch.float32)
    before = after_descent = after_solve = on_fitted = None
    if options.steps:
        how = DescentOptions(steps=options.steps, tokens=options.tokens, lr=options.lr, seed=options.seed)
        result = descend(work, path, names, calls, targets, how, device=device, progress=progress)
        before, after_descent, on_fitted = result.before, result.after, result.on_fitted
    if options.least_squares or before is None:
        fit, check = _equations(work, path, names, calls, targets, device)
        start, after_solve = _solve(part_of(work, path, names.o), fit, check, options)
        before = start if before is None else before
    state = {
        f"{projection}.{leaf}": parameter.detach().cpu()
        for projection in dict.fromkeys((names.q, names.k, names.v, names.o))
        for leaf, parameter in part_of(work, path, projection).named_parameters()
    }
    return state, RefitReport(
        error_before=before,
        error_after_descent=after_descent,
        error_after_least_squares=after_solve,
        error_on_fitted=on_fitted,
    )


def _equations(
    module: nn.Module,
    path: str,
    names: Names,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    device: torch.device | str,
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of the targets on the heads' outputs, over the calls to fit and over those to check on."""
    import torch

    fit, check = NormalEquations(), NormalEquations()
    fitted, checked = held_out(len(calls))
    for i, (call, target) in enumerate(zip(calls, targets, strict=True)):
        heads: list[Tensor] = []
        with torch.no_grad(), watching(module, path, names, on_heads=heads.append):
            args, kwargs = as_float32(to_device(call, torch.device(device)))
            module(*args, **kwargs)
        for numbers, equations in ((fitted, fit), (checked, check)):
            if i in numbers:
                equations.add(heads[0], target)
    return fit, check


def _solve(o: Any, fit: NormalEquations, check: NormalEquations, options: RefitOptions) -> tuple[float, float | None]:
    """Solve for an o projection in place; keep the old one if the new one is no better. Returns the two errors."""
    import torch

    across = hasattr(o, "nf")  # GPT-2's Conv1D holds (in, out)
    present = o.weight.T if across else o.weight
    before = check.error(present, o.bias)
    if not options.least_squares:
        return before, None
    weight, bias = fit.solve(present, o.bias, damping=options.damping)
    after = check.error(weight, bias)
    if after < before:
        with torch.no_grad():
            present.copy_(weight)
            if bias is not None:
                o.bias.copy_(bias)
    return before, min(before, after)
