"""What a sweep tries, and how it measures it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gqa_convert.conversion.recipe import PRESETS, Recipe, make_recipe
from gqa_convert.errors import UsageError, check_choice
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.evaluation import EvalSettings
from gqa_convert.merge.registry import all_methods


@dataclass(frozen=True)
class Aim:
    """How many KV heads a point is to have: so many in every layer, or what fits into a budget."""

    groups: int = 0
    budget: str = ""

    def name(self, variant: str) -> str:
        """Name of the point, which is also that of its folder."""
        return (
            f"{variant}-kv{re.sub('[^0-9A-Za-z.%]+', '-', self.budget)}" if self.budget else f"{variant}-g{self.groups}"
        )


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What to try and how to measure it.

    Attributes:
        groups: KV-head counts that all layers get.
        budgets: sizes of the KV cache within which layers may differ; as `--kv-budget` takes them.
        variants: merge methods, or presets by name.
        evaluation: held-out data.
        benchmark: decode benchmark of each point; None to leave it out.
        tolerance: loss rise that is acceptable, nats per token.
        allow_slow: also try a model of a family that decodes no faster with fewer KV heads.
        calibrate: text for methods that use statistics; None for none (a preset's own choice stands).
        refit: fit each layer to the original afterwards.
        sensitivity: also measure the cost of each layer alone, for the point that is recommended.
        keep_models: keep the converted folders.
        uptrain_tokens: uptrain every point on so many tokens before it is measured; 0 for not.
        uptrain_config: YAML of the uptraining; model, output and budget in it are replaced.
    """

    groups: tuple[int, ...] = ()
    budgets: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("mean",)
    evaluation: EvalSettings
    benchmark: BenchSettings | None = field(default_factory=BenchSettings)
    tolerance: float = 0.05
    allow_slow: bool = False
    calibrate: str | None = None
    refit: bool = False
    sensitivity: bool = True
    keep_models: bool = True
    uptrain_tokens: int = 0
    uptrain_config: Path | None = None

    def __post_init__(self) -> None:
        if not self.groups and not self.budgets:
            raise UsageError("Missing option --groups or --kv-budget: what to try.")
        if self.uptrain_tokens and self.uptrain_config is None:
            raise UsageError("--uptrain-tokens: also needs --uptrain-config, which says on what data and how.")
        if self.uptrain_config is not None and not self.uptrain_config.is_file():
            raise UsageError(f"--uptrain-config {self.uptrain_config}: no such file.")

    @property
    def aims(self) -> tuple[Aim, ...]:
        """What every variant is tried at."""
        return (*(Aim(groups=groups) for groups in self.groups), *(Aim(budget=budget) for budget in self.budgets))

    def recipe(self, variant: str) -> Recipe:
        """The recipe that a variant's name stands for.

        Raises:
            UsageError: if there is no such method or preset, or the choices do not go together.
        """
        chosen: dict[str, Any] = {"refit": self.refit or None}
        check_choice("--methods", variant, [*PRESETS, *all_methods()])
        if variant in PRESETS:
            return make_recipe(variant, calibrate=self.calibrate, **chosen)
        return make_recipe(None, method=variant, calibrate=self.calibrate, **chosen)
