"""What converting one layer costs, estimated for all layers at once from one backward pass.

To second order, the divergence that a change e of one block's output causes is half the expected square of g . e,
where g is the gradient of the log-likelihood of tokens drawn from the model's own predictions: its Fisher information
(Amari 1998, section 2). Errors of different tokens are taken as independent, so that a layer costs

    KL per token  ~  1/2 sum_t (g_t . e_t)^2 / T

which takes one forward and backward pass of the original, and a forward pass of the block alone for each layer and
number of heads, on the inputs that the block sees in the original.

Shapes: B windows, T tokens per window, X hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gqa_convert.errors import UsageError
from gqa_convert.evaluate.examples import batches

if TYPE_CHECKING:
    from gqa_convert.evaluate.allocation import Assembly

OnBatch = Callable[[int, int], None]


@dataclass
class _Call:
    """How a block was called, what it gave, and the gradient of the log-likelihood there."""

    args: Any
    kwargs: Any
    output_BTX: Tensor


@dataclass(frozen=True)
class Estimate:
    """Of one layer at one number of KV heads.

    Attributes:
        kl: divergence from the original, nats per token.
        error: the blocks' squared error over their squared output, which knows nothing of what follows.
    """

    kl: float
    error: float


@dataclass
class _Sums:
    moved: float = 0.0
    error: float = 0.0
    output: float = 0.0


def estimated_costs(
    assembly: Assembly,
    wanted: Iterable[tuple[int, int]],
    *,
    batch: int,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> dict[tuple[int, int], Estimate]:
    """Estimate the divergence from the original of single layers at numbers of KV heads.

    Args:
        assembly: the original and its layers' converted weights.
        wanted: layers and KV heads.
        batch: windows run at a time.
        seed: of the tokens that are drawn.
        on_batch: told of batches done and all there are.

    Raises:
        UsageError: if a layer's conversion changes more than its attention blocks, or they cannot be run alone.
    """
    wanted = list(wanted)
    paths = assembly.blocks()
    draw = torch.Generator().manual_seed(seed)
    sums = {each: _Sums() for each in wanted}
    parts = list(batches(assembly.examples, batch))
    tokens = 0
    for done, part in enumerate(parts):
        calls = _called(assembly.put({}), paths, part.inputs, draw)
        tokens += part.targets.numel()
        for count in sorted({count for _, count in wanted}):
            layers = [layer for layer, each in wanted if each == count]
            model = assembly.put(dict.fromkeys(layers, count))
            for layer in layers:
                _add(sums[layer, count], model, {path: calls[path] for path in paths[layer]})
        if on_batch is not None:
            on_batch(done + 1, len(parts))
    return {each: Estimate(0.5 * s.moved / tokens, s.error / s.output) for each, s in sums.items()}


def _called(
    model: nn.Module, paths: Mapping[int, tuple[str, ...]], inputs: Mapping[str, Tensor], draw: torch.Generator
) -> dict[str, _Call]:
    """Run the original forward and backward; returns how each block was called."""
    calls: dict[str, _Call] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            output_BTX = _first(output)
            output_BTX.retain_grad()
            calls[path] = _Call(_detached(args), _detached(kwargs), output_BTX)

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True)
        for each in paths.values()
        for path in each
    ]
    try:
        with torch.enable_grad():
            logits = model(**inputs, use_cache=False).logits.float().flatten(0, -2)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return calls


def _add(sums: _Sums, model: nn.Module, calls: Mapping[str, _Call]) -> None:
    """Add a batch: the sum over tokens of (g . e)^2, the errors of a layer's blocks together where it has several."""
    moved: Tensor | None = None
    with torch.no_grad():
        for path, call in calls.items():
            assert call.output_BTX.grad is not None
            try:
                output_BTX = _first(model.get_submodule(path)(*call.args, **call.kwargs))
            except Exception as error:  # whatever a model's own code may raise
                raise UsageError(f"--kv-costs estimated: {path} cannot be run by itself ({error}). Measure.") from error
            error_BTX = output_BTX - call.output_BTX
            sums.error += error_BTX.square().sum().item()
            sums.output += call.output_BTX.square().sum().item()
            here = (call.output_BTX.grad * error_BTX).sum(-1)
            moved = here if moved is None else moved + here
    sums.moved += 0.0 if moved is None else moved.square().sum().item()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(each) for each in value)
    return value
