"""The part of a plan that solves whole attention blocks: which, with what freedom, and under which raw keys.

A recipe that rotates heads, regroups them or refits a layer is refused by name where the architecture does not allow
it; what it allows is proven on a tiny random model, not read off a list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gqa_convert.anatomy.anatomy import Anatomy
from gqa_convert.anatomy.block_names import BlockNames, Freedom
from gqa_convert.anatomy.blocks import find_blocks
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.hf.api import KeyMap


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The blocks of a conversion.

    `keys` maps every parameter that solving may change (q, k, v, o, weights and biases; where heads may move, the other
    per-head parameters too) to its raw checkpoint key.
    """

    recipe: Recipe
    blocks: tuple[BlockNames, ...]
    freedom: Freedom
    keys: dict[str, str]

    def parameters(self, names: BlockNames) -> tuple[str, ...]:
        """Names of the parameters of one block that solving may change."""
        own = {f"{path}.{part}" for path in (names.q, names.k, names.v, names.o) for part in ("weight", "bias")}
        own |= {name for extra in self.freedom.extras for name in extra.names(names)}
        return tuple(name for name in self.keys if name in own)

    @property
    def raw_keys(self) -> frozenset[str]:
        """Raw keys that come out of solving instead of the source."""
        return frozenset(self.keys.values())

    def notes(self) -> tuple[str, ...]:
        """What the architecture denies to this recipe, for the plan."""
        notes = []
        if self.freedom.key_gauge != "full" and self.recipe.merge_method.touches_query_output:
            allowed = "only change sign" if self.freedom.key_gauge == "signs" else "not be changed"
            notes.append(f"keys may {allowed} in this architecture (something stands between k and the scores)")
        tied = [names for names in self.blocks if not self.freedom.moves(names)]
        if tied and (self.recipe.adaptable or self.recipe.grouping == "search"):
            where = "" if len(tied) == len(self.blocks) else " in self-attention"
            notes.append(f"groups are contiguous{where}: its heads cannot change places in this architecture")
        if self.freedom.value_gauge != "full" and self.recipe.merge_method.touches_query_output:
            notes.append("values may not be rotated in this architecture (something stands between v and o)")
        return tuple(notes)


def plan_blocks(checkpoint: Checkpoint, anatomy: Anatomy, recipe: Recipe) -> BlockPlan | None:
    """Find and prove what `recipe` needs of a checkpoint's attention blocks; None if it pools tensors only.

    Raises:
        UnsupportedModelError: if the architecture does not allow what the recipe asks for.
        UsageError: if it cannot be calibrated on what the recipe names.
    """
    if not recipe.uses_blocks or anatomy.difference is None:
        return None
    from gqa_convert.anatomy.freedom import prove_freedom
    from gqa_convert.calibrate.inputs import check_calibration

    check_calibration(recipe, anatomy.source)
    try:
        blocks = find_blocks(anatomy.difference)
        freedom = prove_freedom(anatomy.config, anatomy.source.model_class)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{_asked(recipe)} cannot be used on {anatomy.model_type}: {error}") from error
    if recipe.adaptable and not any(map(freedom.moves, blocks)):
        recipe = replace(recipe, grouping="contiguous")
    _check_freedom(anatomy, recipe, freedom, blocks)
    keys = _raw_keys(checkpoint, anatomy, blocks, freedom, recipe)
    return BlockPlan(recipe=recipe, blocks=blocks, freedom=freedom, keys=keys)


def _asked(recipe: Recipe) -> str:
    parts = [f"--method {recipe.method}"]
    if recipe.grouping != "contiguous":
        parts.append(f"--grouping {recipe.grouping}")
    if recipe.refit:
        parts.append("--refit")
    return " ".join(parts)


def _check_freedom(anatomy: Anatomy, recipe: Recipe, freedom: Freedom, blocks: tuple[BlockNames, ...]) -> None:
    if recipe.merge_method.touches_query_output and freedom.key_gauge == freedom.value_gauge == "none":
        raise UnsupportedModelError(
            f"--method {recipe.method} cannot be used on {anatomy.model_type}: on a tiny model of it, neither keys nor "
            "values could be rotated without changing the logits."
        )
    if recipe.grouping == "search" and not any(map(freedom.moves, blocks)):
        raise UnsupportedModelError(
            f"--grouping search cannot be used on {anatomy.model_type}: on a tiny model of it, moving heads changed "
            "the logits (other parameters are tied to the order of heads). Use --grouping contiguous."
        )


def _raw_keys(
    checkpoint: Checkpoint, anatomy: Anatomy, blocks: tuple[BlockNames, ...], freedom: Freedom, recipe: Recipe
) -> dict[str, str]:
    assert anatomy.difference is not None
    wanted = {f"{path}.{part}" for b in blocks for path in (b.q, b.k, b.v, b.o) for part in ("weight", "bias")}
    if recipe.grouping == "search":
        wanted |= {name for b in blocks for extra in freedom.extras for name in extra.names(b)}
        wanted -= anatomy.difference.vanishing
    wanted &= set(anatomy.difference.source_shapes)
    key_map = KeyMap(anatomy.difference.source)
    keys: dict[str, str] = {}
    for raw_key in checkpoint.tensors:
        names = key_map.targets(raw_key)
        for name in wanted.intersection(names):
            if len(names) != 1 or key_map.operations(raw_key):
                raise _stored_otherwise(anatomy, recipe, raw_key)
            if checkpoint.tensors[raw_key].shape != anatomy.difference.source_shapes[name]:
                raise _stored_otherwise(anatomy, recipe, raw_key)
            keys[name] = raw_key
    if wanted - set(keys):
        raise _stored_otherwise(anatomy, recipe, sorted(wanted - set(keys))[0])
    return keys


def _stored_otherwise(anatomy: Anatomy, recipe: Recipe, key: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{_asked(recipe)} cannot be used on {anatomy.model_type}: {key} is stored in another form than the model's. "
        "Load and save it with transformers first, or use --preset paper."
    )
