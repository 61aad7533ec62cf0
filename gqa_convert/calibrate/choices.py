"""What a run takes from its recipe, its inputs and the model's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.inputs import max_positions
from gqa_convert.calibrate.refit import RefitOptions
from gqa_convert.calibrate.weights import layer_paths
from gqa_convert.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gqa_convert.anatomy.blocks import BlockNames
    from gqa_convert.recipe import Recipe


def batch_size(inputs: Mapping[str, Tensor], tokens: int) -> int:
    """Return the windows of one call, which is also one step of a refit of `tokens` tokens."""
    decoded = list(inputs.values())[-1]
    return max(1, round(tokens / decoded.shape[1]))


def blocks_by_layer(model: nn.Module, blocks: Sequence[BlockNames]) -> dict[str, list[BlockNames]]:
    """Return the blocks of each layer by its path, in the model's order.

    Raises:
        UnsupportedModelError: if a block is in no layer.
    """
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
    context = recipe.max_context or max_positions(config)
    if not context:
        raise UsageError("--fold: the configuration states no context length. Give --max-context.")
    return context
