"""What a user chooses about a merge, and the presets that choose for them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from gqa_convert.errors import UsageError, check_choice
from gqa_convert.merge.registry import MergeMethod, get_method

VERIFY_LEVELS = ("none", "structure", "logits")
ROUTES = ("auto", "native", "remote-code")
GROUPINGS = ("contiguous", "search")
SELF = "self"
"""The `calibrate` value that samples text from the source model."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How KV heads are merged.

    Raises:
        UsageError: if a choice is unknown, or two do not go together.
    """

    method: str = "mean"
    seed: int = 0
    grouping: str = "contiguous"
    """`contiguous` (adjacent heads, as in the paper) or `search` (equal groups of least residual)."""
    calibrate: str | None = None
    """Text for the statistics: a file, a folder, a hub dataset, or `self`; None for none."""
    sequences: int = 128
    """Calibration sequences."""
    length: int = 2048
    """Tokens of each, at most the model's context."""
    fold: bool = False
    """Treat rotary pairs that hardly turn as not turning (methods that can)."""
    max_context: int | None = None
    """Longest context in tokens that a fold must keep sound; None for the configuration's."""
    refit: bool = False
    """Fit each layer's attention to the original's output afterwards."""
    refit_steps: int = 300
    """Gradient steps for each layer; 0 for the least squares of o_proj alone."""
    refit_tokens: int = 2048
    """Tokens of each step."""
    refit_lr: float | None = None
    """Peak learning rate; None for a rule by width."""
    adaptable: bool = False
    """True for a preset: where an architecture's heads cannot change places, groups are contiguous instead."""

    def __post_init__(self) -> None:
        method = self.merge_method
        check_choice("--grouping", self.grouping, GROUPINGS)
        for name, least in (("sequences", 1), ("length", 2), ("refit_steps", 0), ("refit_tokens", 1)):
            if getattr(self, name) < least:
                flag = {"sequences": "calibration-sequences", "length": "calibration-length"}.get(name, name)
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(self, name)}: must be at least {least}.")
        if self.max_context is not None and self.max_context < 1:
            raise UsageError(f"--max-context {self.max_context}: must be at least 1 token.")
        if self.refit_lr is not None and self.refit_lr <= 0:
            raise UsageError(f"--refit-lr {self.refit_lr}: must be above 0.")
        if self.fold and not method.folds:
            raise UsageError(f"--fold: the method {self.method} has no use for it; --method pca has.")
        if self.refit and self.calibrate is None:
            raise UsageError("--refit: needs text to fit on. Add --calibrate DATA, or --calibrate self.")

    @property
    def merge_method(self) -> MergeMethod:
        """The registered method."""
        return get_method(self.method)

    @property
    def self_written(self) -> bool:
        """True if the source model writes the calibration text itself."""
        return self.calibrate == SELF

    @property
    def uses_blocks(self) -> bool:
        """True if whole attention blocks are solved, not single tensors pooled."""
        return self.merge_method.maps is not None or self.grouping != "contiguous" or self.refit

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Read back what `to_json` gives; what it leaves out plays no part.

        Raises:
            UsageError: if there is a choice that this version does not know, or cannot honour.
        """
        unknown = sorted(values.keys() - {each.name for each in fields(cls)})
        if unknown:
            raise UsageError(f"{unknown[0]}: no such choice of a recipe.")
        try:
            return cls(**values)
        except (TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"a choice of the recipe is of the wrong kind ({error}).") from error

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values; only what plays a part."""
        values = asdict(self)
        del values["adaptable"]
        if not self.uses_blocks:
            return {key: values[key] for key in ("method", "seed", "grouping")}
        if self.calibrate is None:
            values = {key: value for key, value in values.items() if key not in ("sequences", "length")}
        if not self.refit:
            values = {key: value for key, value in values.items() if not key.startswith("refit_")}
        return values


PRESETS: dict[str, tuple[str, Recipe]] = {
    "paper": ("mean of adjacent heads, as in the paper; seconds", Recipe()),
    "fast": (
        "calibrated pca of searched groups; closed form, minutes",
        Recipe(method="pca", grouping="search", calibrate=SELF, fold=True, adaptable=True),
    ),
    "best": (
        "fast, then each layer fitted to the original's attention output",
        Recipe(method="pca", grouping="search", calibrate=SELF, fold=True, refit=True, adaptable=True),
    ),
}


def make_recipe(preset: str | None = None, **chosen: Any) -> Recipe:
    """Return a preset's recipe with the given choices (those that are not None) in place of its own.

    Raises:
        UsageError: if the preset is unknown or the choices do not go together.
    """
    if preset is not None:
        check_choice("--preset", preset, PRESETS)
    base = PRESETS[preset][1] if preset else Recipe()
    if chosen.get("grouping") is not None:
        base = replace(base, adaptable=False)
    return replace(base, **{name: value for name, value in chosen.items() if value is not None})
