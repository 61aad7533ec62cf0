"""The sizes at which the paper is repeated: everything a run depends on, so that its hash can name its results."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's size; `heads` divide `width`, and a T5 has `layers` in the encoder and in the decoder."""

    layers: int
    width: int
    heads: int
    mlp: int


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """Learning rates: `rate` until `offset` steps, then falling with the root of the step, as T5's schedule does."""

    kind: str
    rate: float
    warmup_steps: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """The model of random weights whose decode time is measured, and the cache it decodes behind."""

    shape: Shape
    vocabulary: int
    context: int
    batch: int
    steps: int
    rounds: int
    output_tokens: int
    """A sample is this many tokens long (512 in the paper)."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the reproduction, for one family.

    Attributes:
        name: on the command line.
        large: the model that is converted.
        small: the smaller one of Table 1.
        context: tokens per sequence (of a T5, what its encoder reads).
        batch: sequences a step.
        steps: of pretraining; alpha is a share of them.
        seeds: each its own pretraining, data order and merge.
        alphas: where curves are evaluated, up to the largest; a step at least.
        gqa_groups: KV heads of "GQA".
        held_out_tokens: scored at every point.
        calibration_sequences: of `context` tokens, for the calibrated merges.
        refit_steps: of the preset `best`, a layer.
        optimiser: of pretraining and uptraining.
        decode: what Figure 6 and the times of Table 1 are measured on.
        text: `stdlib` (the standard library's modules) or `installed` (those of every installed package too).
        device: `cpu`, or `auto` for a GPU where there is one.
        precision: of training.
    """

    name: str
    large: Shape
    small: Shape
    context: int
    batch: int
    steps: int
    seeds: tuple[int, ...]
    alphas: tuple[float, ...]
    gqa_groups: int
    held_out_tokens: int
    calibration_sequences: int
    refit_steps: int
    optimiser: Optimiser
    decode: DecodeShape
    text: str
    device: str
    precision: str

    @property
    def batch_tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.context

    @property
    def pretraining_tokens(self) -> int:
        """Tokens of the pretraining, of which alpha is a share."""
        return self.steps * self.batch_tokens

    def steps_of(self, alpha: float) -> int:
        """Steps that come to a share of the pretraining; at least one."""
        return max(1, round(alpha * self.steps))


ALPHAS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)

TINY = Scale(
    name="tiny",
    large=Shape(layers=4, width=128, heads=8, mlp=336),
    small=Shape(layers=2, width=64, heads=4, mlp=176),
    context=128,
    batch=8,
    steps=1000,
    seeds=(0, 1, 2),
    alphas=ALPHAS,
    gqa_groups=2,
    held_out_tokens=8_192,
    calibration_sequences=40,
    refit_steps=100,
    optimiser=Optimiser(kind="adamw", rate=3e-3, warmup_steps=50, offset=200),
    decode=DecodeShape(
        shape=Shape(layers=4, width=512, heads=16, mlp=1360),
        vocabulary=2048,
        context=2048,
        batch=8,
        steps=4,
        rounds=7,
        output_tokens=512,
    ),
    text="stdlib",
    device="cpu",
    precision="float32",
)

SMALL = replace(
    TINY,
    name="small",
    large=Shape(layers=8, width=512, heads=8, mlp=1376),
    small=Shape(layers=4, width=256, heads=8, mlp=688),
    context=512,
    batch=32,
    steps=8000,
    held_out_tokens=131_072,
    calibration_sequences=128,
    refit_steps=300,
    optimiser=Optimiser(kind="adamw", rate=1.5e-3, warmup_steps=200, offset=800),
    decode=DecodeShape(
        shape=Shape(layers=16, width=2048, heads=16, mlp=5504),
        vocabulary=32_000,
        context=2048,
        batch=32,
        steps=16,
        rounds=9,
        output_tokens=512,
    ),
    text="installed",
    device="auto",
    precision="bf16",
)

TINY_T5 = replace(
    TINY,
    large=Shape(layers=2, width=128, heads=8, mlp=336),
    small=Shape(layers=1, width=64, heads=4, mlp=176),
    # T5's own optimiser, moving each tensor in proportion to its size; AdamW at 3e-3 was 0.24 nats behind at 600 steps.
    optimiser=Optimiser(kind="adafactor", rate=2e-2, warmup_steps=0, offset=200),
)

SMALL_T5 = replace(
    SMALL,
    large=Shape(layers=4, width=512, heads=8, mlp=1376),
    small=Shape(layers=2, width=256, heads=8, mlp=688),
    optimiser=Optimiser(kind="adafactor", rate=2e-2, warmup_steps=0, offset=800),
)

Scales = dict[str, Scale]
"""By family."""

SCALES: dict[str, Scales] = {
    "tiny": {"decoder": TINY, "t5": TINY_T5},
    "small": {"decoder": SMALL, "t5": SMALL_T5},
}
