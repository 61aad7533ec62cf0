"""Train one attention module, by itself, to give the outputs of the original one (blockwise local distillation).

The loss is the mean square error of the o projection's output over the mean square of the original's (Puzzle, Bercovich
et al. 2024, arXiv 2411.19146, section 3.1, on attention alone). No other layer and no language-model loss is involved.

Shape suffixes: B batch, T tokens, X width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.activations import to_device
from gqa_convert.calibrate.hooks import Names, part_of, watching
from gqa_convert.calibrate.quick import quick_products

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Call = tuple[tuple[Any, ...], dict[str, Any]]

_CHECKS = 6  # looks at the held-out calls during a descent; the best of them is what is kept


@dataclass(frozen=True, kw_only=True)
class DescentOptions:
    """How one layer is trained."""

    steps: int = 300
    tokens: int = 1
    """A step takes calls until it has half as many; where calls are of many shapes, one alone may be small."""
    relative_lr: float = 0.02
    """Peak learning rate of each tensor, as a share of the root mean square of its elements; see `tensor_lr`."""
    full_width: int = 1024
    """Above this input width the share falls with the square root of the width."""
    lr: float | None = None
    """One absolute peak learning rate for all tensors in its place."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DescentResult:
    """Error on held-out calls, as a share of the outputs' mean square, before and after."""

    before: float
    after: float
    on_fitted: float
    """The same on the calls that were trained on, over the last pass through them (or the last steps, if fewer)."""
    steps: int


def tensor_lr(parameter: Tensor, companion: Tensor, options: DescentOptions) -> float:
    """Peak learning rate of one tensor.

    Adam moves every element by about the learning rate a step whatever the gradient, so the rate is set against the
    size of the elements. The more inputs a layer has, the more such moves add up, so very wide ones move less. (Best
    shares of 80 steps on layers of width 96, 128, 512, 1024: 0.02 to 0.04, 0.04 to 0.08, 0.02 to 0.04, 0.02 to 0.04.)
    A bias takes its weight's size (`companion`): its own may be nothing.
    """
    if options.lr is not None:
        return options.lr
    size = max(float(x.detach().float().square().mean()) for x in (companion, parameter))
    crowding = min(1.0, math.sqrt(options.full_width / companion.shape[-1]))
    return options.relative_lr * crowding * math.sqrt(size)


def held_out(count: int) -> tuple[list[int], list[int]]:
    """Split call numbers into those trained on and those the error is measured on (the last sixteenth, at least one).

    A single call serves as both.
    """
    if count == 1:
        return [0], [0]
    kept = max(1, count // 16)
    return list(range(count - kept)), list(range(count - kept, count))


def descend(
    module: nn.Module,
    path: str,
    names: Names,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    options: DescentOptions,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> DescentResult:
    """Train q, k, v and o of the attention module `module` in place, in float32; nothing else of it changes.

    What is left in the module is the best state met on the held-out calls, the start included. On a processor that
    multiplies in bfloat16 by instructions of its own, steps compute in it; weights, their sums and errors stay float32.

    Args:
        module: the attention module, on any device; moved to `device` and left there.
        path: its path in the model.
        names: the block.
        calls: its arguments, an entry a step's worth of tokens.
        targets: what its o projection should give for each, (B, T, X).
        options: see `DescentOptions`.
        device: where to train.
        progress: called with the number of steps done since the last call.
    """
    import torch

    where = torch.device(device)
    module.to(device=where, dtype=torch.float32).requires_grad_(False)
    groups = _trainable(module, path, names, options)
    parameters = [group["params"][0] for group in groups]
    train, check = held_out(len(calls))
    powers = {i: float(targets[i].float().square().sum()) for i in train}
    scale = sum(powers.values()) / len(train) or 1.0

    def error(i: int) -> Tensor:
        args, kwargs = as_float32(to_device(calls[i], where))
        seen: list[Tensor] = []
        with watching(module, path, names, on_output=seen.append):
            module(*args, **kwargs)
        return (seen[0] - targets[i].to(where, torch.float32)).square().sum()

    def check_error() -> float:
        with torch.no_grad():
            power = sum(float(targets[i].float().square().sum()) for i in check)
            return sum(float(error(i)) for i in check) / (power or 1.0)

    before = best = check_error()
    kept = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.Adam(groups, betas=options.betas, eps=1e-12, foreach=False)
    peaks = [group["lr"] for group in groups]
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    every = max(1, math.ceil(options.steps / _CHECKS))
    latest: deque[tuple[Tensor, float]] = deque(maxlen=len(train))  # error and power of the calls trained on
    for step in range(options.steps):
        if not order:
            order = [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, options)
        optimiser.zero_grad(set_to_none=True)
        for i in _step_calls(order, targets, options.tokens / 2):
            with torch.enable_grad(), quick_products(where):
                loss = error(i) / scale
            loss.backward()
            latest.append((loss.detach(), powers[i]))
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters):
            optimiser.step()
        if progress:
            progress(1)
        if (step + 1) % every == 0 or step + 1 == options.steps:
            now = check_error()
            if now < best:
                best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    module.requires_grad_(False)
    on_fitted = sum(float(loss) for loss, _ in latest) * scale / (sum(power for _, power in latest) or 1.0)
    return DescentResult(before=before, after=best, on_fitted=on_fitted, steps=options.steps)


def _step_calls(order: list[int], targets: Sequence[Tensor], tokens: float) -> Iterator[int]:
    """Take call numbers from the end of `order`, at least one, until they come to so many tokens or none is left."""
    while order:
        i = order.pop()
        tokens -= targets[i].shape[:-1].numel()
        yield i
        if tokens <= 0:
            return


def schedule(step: int, options: DescentOptions) -> float:
    """Share of the peak learning rate at a step: a short rise, then a cosine to nothing."""
    rise = max(1, round(options.warmup * options.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, options.steps - rise)))


def as_float32(value: Any) -> Any:
    """Return nested arguments with every floating tensor in float32."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(as_float32(item) for item in value)
    if isinstance(value, list):
        return [as_float32(item) for item in value]
    if type(value) is dict:
        return {key: as_float32(item) for key, item in value.items()}
    return value


def _trainable(module: nn.Module, path: str, names: Names, options: DescentOptions) -> list[dict[str, Any]]:
    """Parameter groups, one a tensor, of the projections' weights and biases; they are made to ask for gradients."""
    groups = []
    for projection in dict.fromkeys((names.q, names.k, names.v, names.o)):
        part = part_of(module, path, projection)
        for parameter in part.parameters():
            weight = getattr(part, "weight", parameter)
            parameter.requires_grad_(True)
            groups.append({"params": [parameter], "lr": tensor_lr(parameter, weight, options)})
    return groups
