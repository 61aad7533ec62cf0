"""What a transpile rule is, and where the rules are found.

A new rule is one new file in `rules/` with one `Rule` registered; no import line is needed anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqa_convert.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from gqa_convert.checkpoint.safetensors_file import TensorInfo


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint as a rule sees it: its configuration and its tensors by the names of its model's parameters.

    Attributes:
        folder: for messages.
        config: as its transformers class reads it, defaults filled in.
        values: config.json as parsed.
        infos: parameter name -> stored tensor.
    """

    folder: Path
    config: Any
    values: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]

    def info(self, name: str) -> TensorInfo:
        """Return the stored tensor of a parameter.

        Raises:
            CheckpointError: if there is none.
        """
        if name not in self.infos:
            raise CheckpointError(
                f"{self.folder}: the weights lack {name}, which config.json ({self.config.model_type}) calls for."
            )
        return self.infos[name]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of the target: copied as it is, or computed.

    Attributes:
        key: parameter name in the target's model.
        sources: parameter names in the source's model whose tensors `make` takes; for a copy, the one.
        like: the source parameter whose dtype and weight file it gets; by default the first of `sources`.
        shape: sizes of the axes of a computed tensor.
        make: computes the tensor from the source's, in any float dtype; None for a copy of the same bytes.
    """

    key: str
    sources: tuple[str, ...] = ()
    like: str = ""
    shape: tuple[int, ...] = ()
    make: Callable[..., Tensor] | None = None

    @property
    def home(self) -> str:
        """The source parameter that lends its dtype and weight file."""
        return self.like or self.sources[0]


def copy(key: str, source: str) -> Part:
    """A tensor that keeps its bytes and gets another name."""
    return Part(key=key, sources=(source,))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one family is expressed as another.

    Attributes:
        name: for messages; unique.
        sources: model types it reads.
        source_class: the class whose checkpoints it reads.
        target: model type it writes.
        target_class: the class that loads the result.
        why: why the target computes the same, after "because".
        rounding: what of it rounds where weights are stored in half precision; "" if every number keeps its bits.
        applies: whether the rule is meant for a configuration of its model types (Pythia has two forms).
        refusal: why a configuration of its own cannot be expressed; None if it can.
        config: config.json of the target with as many KV heads as query heads.
        parts: the tensors of the target.
        only_groups: KV-head counts the target can hold besides all heads; None for every divisor.
        notes: what a user should know, by configuration.
    """

    name: str
    sources: tuple[str, ...]
    source_class: str
    target: str
    target_class: str
    why: str
    rounding: str = ""
    applies: Callable[[Any], bool] = lambda config: True
    refusal: Callable[[Any], str | None] = lambda config: None
    config: Callable[[Source], dict[str, Any]]
    parts: Callable[[Source], Iterable[Part]]
    only_groups: tuple[int, ...] | None = None
    notes: Callable[[Any], tuple[str, ...]] = lambda config: ()


_RULES: dict[str, Rule] = {}


def register(rule: Rule) -> Rule:
    """Add a rule to those that `rules_for` finds.

    Raises:
        ValueError: if its name is taken.
    """
    if rule.name in _RULES:
        raise ValueError(f"transpile rule {rule.name!r} is registered twice")
    _RULES[rule.name] = rule
    return rule


def all_rules() -> dict[str, Rule]:
    """Every rule by name, in alphabetical order. Imports no torch."""
    package = importlib.import_module("gqa_convert.modeling.transpile.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_RULES.items()))


def rules_for(model_type: str) -> tuple[Rule, ...]:
    """Every rule that reads a model type."""
    return tuple(rule for rule in all_rules().values() if model_type in rule.sources)


def rule_for(config: Any) -> Rule | None:
    """The rule meant for a configuration; None if there is none."""
    return next((rule for rule in rules_for(str(config.model_type)) if rule.applies(config)), None)
