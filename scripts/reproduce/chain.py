"""One seed of one family from random weights to the end of every arm, each step a piece that is done once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arms import ARMS, CALIBRATED, CONTROL, PAPER, PRESETS, Arm
from corrupted import corrupted_file
from pieces import Piece, Pieces, Unfinished
from sources import training_file
from stopwatch import Stopwatch
from training import UPTRAINING_ORDER, settings, train
from untrained import write_untrained

if TYPE_CHECKING:
    from scales import Scale, Shape

_CHARACTERS_A_TOKEN = 8
"""More than any text here has: enough is written for the calibration wanted."""


class Chain:
    """The pieces of one family and seed.

    Args:
        pieces: where they are kept.
        scale: sizes.
        family: of `untrained.FAMILIES`.
        seed: of weights, order and merges.
        arms: what is compared.
    """

    def __init__(self, pieces: Pieces, scale: Scale, family: str, seed: int, arms: tuple[Arm, ...] = ARMS) -> None:
        self.pieces, self.scale, self.family, self.seed, self.arms = pieces, scale, family, seed, arms

    def run(self) -> dict[str, Any]:
        """Do what is not done; return everything that was found, as JSON values."""
        large = self.pretrained("large")
        results: dict[str, Any] = {"pretraining": {"large": large.result}, "arms": {}}
        for arm in self.arms:
            results["arms"][arm.name] = self._found(arm, large)
        results["pretraining"]["small"] = self.pretrained("small").result
        return results

    def finished(self) -> dict[str, Any] | None:
        """What `run` would return, of the pieces that are done; None until the paper's own arms are."""
        results: dict[str, Any] = {"pretraining": {}, "arms": {}}
        for size in ("large", "small"):
            with suppress(Unfinished):
                results["pretraining"][size] = self.pretrained(size).result
        for arm in self.arms:
            with suppress(Unfinished):
                results["arms"][arm.name] = self._found(arm, self.pretrained("large"))
        results["processor_seconds"] = self.pieces.processor_seconds(f"{self.family}-{self.seed}-")
        return results if all(arm.name in results["arms"] for arm in PAPER) else None

    def pretrained(self, size: str) -> Piece:
        """A model trained from random weights; its curve is taken ten times."""
        scale = self.scale
        shape: Shape = getattr(scale, size)

        def make(folder: Path) -> dict[str, Any]:
            parameters = write_untrained(folder / "untrained", self.family, shape, scale, self.seed)
            config = self._settings(folder / "untrained", folder / "run", seed=self.seed, start=0, steps=scale.steps)
            marks = [round(scale.steps * tenth / 10) for tenth in range(1, 11)]
            return {"parameters": parameters} | train(config, marks=marks, keep_model=True)

        described = self._described(Path("untrained"), seed=self.seed, start=0, steps=scale.steps)
        return self.pieces.get(self._name(f"pretrain-{size}"), {"shape": asdict(shape), "run": described}, make)

    def start(self, arm: Arm, large: Piece) -> Piece:
        """The converted model that an arm starts from (for the control, the original)."""
        if arm.start == CONTROL:
            return large
        groups, scale = self.groups(arm), self.scale
        chosen: dict[str, Any] = {"seed": self.seed}
        if arm.start in CALIBRATED:
            chosen |= {"sequences": scale.calibration_sequences, "length": scale.context}
        if arm.start in PRESETS:
            chosen |= {"refit_steps": scale.refit_steps}
        else:
            chosen |= {"method": arm.start}

        def make(folder: Path) -> dict[str, Any]:
            from gqa_convert import convert
            from gqa_convert.conversion.recipe import make_recipe

            data: dict[str, Any] = {}
            if arm.start in CALIBRATED:
                data = {"calibrate": str(self._calibration(folder / "calibration.jsonl", _final(large)))}
            recipe = make_recipe(arm.start if arm.start in PRESETS else None, **chosen, **data)
            watch = Stopwatch(scale.device)
            convert(_final(large), groups=groups, out=folder / "model", recipe=recipe, force=True)
            calibrated = scale.calibration_sequences * scale.context if data else 0
            return {
                "conversion_seconds": round(watch.seconds, 2),
                "calibration_tokens": calibrated,
                "kv_heads": groups,
            }

        described = {"of": large.key, "groups": groups, "recipe": chosen, "preset": arm.start, "text": scale.text}
        if arm.start in CALIBRATED:
            # There were results of earlier ways to take calibration text.
            described["tokens"] = "by the attention received" + (", single documents" if self.family == "t5" else "")
        return self.pieces.get(self._name(f"start-{arm.start}-{arm.groups}"), described, make)

    def arm(self, arm: Arm, start: Piece, large: Piece) -> Piece:
        """An uptraining."""
        scale = self.scale
        steps = scale.steps_of(arm.alpha)
        seed = UPTRAINING_ORDER + self.seed
        marks = sorted({scale.steps_of(alpha) for alpha in scale.alphas if alpha <= arm.alpha} | {steps})
        teacher = {"teacher": str(_final(large)), "dtype": "float32"} if arm.objective == "kd" else None

        def make(folder: Path) -> dict[str, Any]:
            model = _final(large) if arm.start == CONTROL else start.folder / "model"
            config = self._settings(model, folder / "run", seed=seed, start=scale.steps, steps=steps)
            config["objective"]["distillation"] = teacher
            return train(config, marks=marks, keep_model=False)

        described = self._described(Path("start"), seed=seed, start=scale.steps, steps=steps)
        described |= {"from": start.key, "objective": arm.objective, "marks": marks}
        return self.pieces.get(self._name(f"arm-{arm.name}"), described, make)

    def _found(self, arm: Arm, large: Piece) -> dict[str, Any]:
        start = self.start(arm, large)
        converted = {} if arm.start == CONTROL else start.result
        return arm.to_json() | self.arm(arm, start, large).result | converted

    def _calibration(self, file: Path, model: Path) -> Path:
        """Write what a conversion is calibrated on: training text, for a T5 with spans cut out of it."""
        scale = self.scale
        if self.family == "t5":
            return corrupted_file(file, model, scale.text, context=scale.context, count=scale.calibration_sequences)
        return training_file(file, scale.text, scale.calibration_sequences * scale.context * _CHARACTERS_A_TOKEN)

    def groups(self, arm: Arm) -> int:
        """KV heads of an arm."""
        return {"gqa": self.scale.gqa_groups, "mqa": 1}.get(arm.groups, self.scale.large.heads)

    def _name(self, what: str) -> str:
        return f"{self.family}-{self.seed}-{what}"

    def _settings(self, model: Path, output: Path, *, seed: int, start: int, steps: int) -> dict[str, Any]:
        values = settings(self.scale, self.family, model=model, output=output, seed=seed, start_step=start, steps=steps)
        values["data"]["cache"] = str(self.pieces.root / f"tokens-{self.family}-{self.seed}")
        return values

    def _described(self, model: Path, *, seed: int, start: int, steps: int) -> dict[str, Any]:
        """The settings without the places where things lie."""
        return settings(
            self.scale, self.family, model=model, output=Path("run"), seed=seed, start_step=start, steps=steps
        )


def _final(large: Piece) -> Path:
    return large.folder / "run" / "final"
