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
from typing import TYPE_CHECKING, Protocol

from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gqa_convert.heads import Grouping


class PoolFunction(Protocol):
    """Merge any tensor that has the KV heads along one axis; nothing else of the layer need be known."""

    def __call__(
        self, x: Tensor, grouping: Grouping, dim: int, *, generator: Generator | None = None, std: float | None = None
    ) -> Tensor:
        """Take axis `dim` of size K*D to G*D; same dtype, device and remaining axes."""
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
    pool: PoolFunction
    """The merge of one tensor."""


_METHODS: dict[str, MergeMethod] = {}


def merge_method(
    *, name: str, title: str, reference: str, needs_statistics: bool, touches_query_output: bool
) -> Callable[[PoolFunction], PoolFunction]:
    """Register the decorated function as the merge method `name`.

    Raises:
        ValueError: if the name is taken by another function.
    """

    def register(function: PoolFunction) -> PoolFunction:
        if name in _METHODS:
            raise ValueError(f"merge method {name!r} is registered twice")
        _METHODS[name] = MergeMethod(
            name=name,
            title=title,
            reference=reference,
            needs_statistics=needs_statistics,
            touches_query_output=touches_query_output,
            pool=function,
        )
        return function

    return register


def all_methods() -> dict[str, MergeMethod]:
    """Every merge method by name, in alphabetical order. Imports no torch."""
    package = importlib.import_module("gqa_convert.merge.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


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
