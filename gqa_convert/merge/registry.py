"""The merge methods: one file each in `gqa_convert/merge/methods/`, found by themselves.

A new method is one new file there with one decorated function; no import line is needed anywhere. The files import
torch inside their functions only, so that listing the methods is cheap.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gqa_convert.heads import Grouping
    from gqa_convert.merge.maps import GroupMaps
    from gqa_convert.merge.moments import BlockMoments
    from gqa_convert.merge.options import MergeOptions


class PoolFunction(Protocol):
    """Merge any tensor that has the KV heads along one axis; nothing else of the layer need be known."""

    def __call__(
        self, x: Tensor, grouping: Grouping, dim: int, *, generator: Generator | None = None, std: float | None = None
    ) -> Tensor:
        """Take axis `dim` of size K*D to G*D; same dtype, device and remaining axes."""
        ...


class MapFunction(Protocol):
    """Decide how one group's heads are mapped to their shared head, from the moments of the block."""

    def __call__(self, moments: BlockMoments, members: tuple[int, ...], options: MergeOptions) -> GroupMaps:
        """Return the maps of the KV heads `members` (two or more)."""
        ...


class CostFunction(Protocol):
    """The residual that `MapFunction` would leave for a group, where it can be had without the maps."""

    def __call__(self, moments: BlockMoments, members: tuple[int, ...]) -> tuple[float, float]:
        """Return the (key, value) residual of the KV heads `members`."""
        ...


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """One way to merge KV heads."""

    name: str
    """As given to `--method`."""
    title: str
    """One line for the list of methods."""
    reference: str
    """Where it comes from."""
    needs_statistics: bool
    """True if the method loses much without second moments of the layer's input."""
    touches_query_output: bool
    """True if q and o change in value too (under any other grouping than the contiguous one their heads also move)."""
    folds: bool = False
    """True if the method makes use of `MergeOptions.max_context`."""
    draws: bool = False
    """True if the method draws random numbers: a `PoolFunction` from the generator it is given, a `MapFunction` from
    `gqa_convert.merge.seeding.generator_for(options.seed, options.key)`. Such a method merges projections alone: norms
    and biases go by `plain_method`, and so does a search for groups."""
    pool: PoolFunction | None = None
    """The merge of one tensor; None for a method that must see the whole block."""
    maps: MapFunction | None = None
    """The merge of one group of a block; None for a method that pools tensors."""
    cost: CostFunction | None = None
    """The residual of a group, faster than through its maps; optional."""


_METHODS: dict[str, MergeMethod] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def merge_method(
    *,
    name: str,
    title: str,
    reference: str,
    needs_statistics: bool,
    touches_query_output: bool,
    folds: bool = False,
    draws: bool = False,
    cost: CostFunction | None = None,
) -> Callable[[_Function], _Function]:
    """Register the decorated function as the merge method `name`.

    The function is a `MapFunction` if the method touches q and o, else a `PoolFunction`.

    Raises:
        ValueError: if the name is taken by another function.
    """

    def register(function: _Function) -> _Function:
        if name in _METHODS:
            raise ValueError(f"merge method {name!r} is registered twice")
        _METHODS[name] = MergeMethod(
            name=name,
            title=title,
            reference=reference,
            needs_statistics=needs_statistics,
            touches_query_output=touches_query_output,
            folds=folds,
            draws=draws,
            pool=None if touches_query_output else function,
            maps=function if touches_query_output else None,
            cost=cost,
        )
        return function

    return register


def all_methods() -> dict[str, MergeMethod]:
    """Every merge method by name, in alphabetical order. Imports no torch."""
    package = importlib.import_module("gqa_convert.merge.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


def plain_method() -> MergeMethod:
    """The paper's mean, for what a method leaves alone: norms, biases and convolutions beside the projections."""
    return get_method("mean")


def get_method(name: str) -> MergeMethod:
    """Look a merge method up by name.

    Raises:
        UsageError: if there is none of that name; the message gives the nearest match and all choices.
    """
    methods = all_methods()
    if name in methods:
        return methods[name]
    near = difflib.get_close_matches(name, methods, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"--method {name}: no such merge method.{hint} Choose one of {', '.join(methods)}.")
