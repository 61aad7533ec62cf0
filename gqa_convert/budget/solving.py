"""What converting by `fast`, `best` and `heal` takes for a model of a known shape: operations by count, and hours.

The counts are those of `conversion/forecast.py`, which has a checkpoint and the machine at hand; here there is neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gqa_convert.budget.arithmetic import device_tflops
from gqa_convert.console import size

if TYPE_CHECKING:
    from gqa_convert.budget.shape import ModelShape

CALIBRATION_TOKENS = 128 * 2048
REFIT_TOKENS = 300 * 2048
HEAL_TOKENS = 500 * 1024
FLOAT32_SHARE = 1 / 16
"""Solving is float32; devices are known by their bf16 peak (67 and 989 TFLOP/s on an H100)."""
PEAK = 1.9
"""Measured peaks of memory over what is counted while layers are solved."""
_LENGTH = 2048
_HEAL_STEPS = 500
_HEAD = 128
"""Width of a head, where healing's optimiser takes attention head by head: where matrices cost more than passes."""


@dataclass(frozen=True, kw_only=True)
class Solving:
    """What one preset takes: floating-point operations, hours on one device, and bytes while layers are solved.

    Most of the memory is activations: beyond half of what is free they go to files.
    """

    flops: float
    device_hours: float
    memory_bytes: int

    def to_json(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def solving(shape: ModelShape, *, hardware: str, mfu: float) -> dict[str, Solving]:
    """Operations and hours by preset: `fast`, `best`, and `heal`, which is best and then distilled.

    Args:
        shape: the model.
        hardware: a name of `budget.shape.devices()`, or a number of bf16 TFLOP/s.
        mfu: share of the peak that products reach, in float32 as in bf16.

    Raises:
        UsageError: for an unknown device.
    """
    width = shape.hidden_size or shape.attention_width
    attention = shape.layers * 2 * width * (shape.attention_width + (shape.kv_width or shape.attention_width))
    scores = 4 * min(_LENGTH, shape.context) * shape.attention_width * shape.layers
    forward = 2 * shape.matmul_parameters + scores
    fast = CALIBRATION_TOKENS * forward + shape.layers * (2 * CALIBRATION_TOKENS * width**2 + 8 * width**3)
    best = fast + CALIBRATION_TOKENS * forward + 3 * REFIT_TOKENS * (2 * attention + scores)
    # Healing: both models forward, backward through what is frozen and for the gradients of attention; Muon's products.
    heal: float = HEAL_TOKENS * (2 * forward + 2 * shape.matmul_parameters + scores + 2 * attention)
    # Of q and o: how small k and v have become is not known here.
    whole = _HEAL_STEPS * shape.layers * muon_flops([(width, shape.attention_width)] * 2)
    heads = [(width, _HEAD)] * max(1, 2 * shape.attention_width // _HEAD)
    heal += whole if whole <= heal else _HEAL_STEPS * shape.layers * muon_flops(heads)
    peak = device_tflops(hardware) * 1e12 * mfu * 3600
    hours = {"fast": fast / (peak * FLOAT32_SHARE), "best": best / (peak * FLOAT32_SHARE)}
    hours["heal"] = hours["best"] + heal / peak
    flops = {"fast": fast, "best": best, "heal": best + heal}
    layer = 4 * shape.matmul_parameters / shape.layers
    held = {"fast": layer + 2 * 4 * CALIBRATION_TOKENS * width, "best": 2 * layer + 6 * 4 * CALIBRATION_TOKENS * width}
    return {
        name: Solving(
            flops=float(flops[name]),
            device_hours=hours[name],
            memory_bytes=round(PEAK * (8 * width**2 + held["fast" if name == "fast" else "best"])),
        )
        for name in hours
    }


def muon_flops(shapes: Iterable[tuple[int, ...]]) -> float:
    """Operations of one step of Muon over parameters of these shapes.

    Five rounds of three products for every matrix: two with its narrow side squared, one with it cubed.
    """
    sides = [sorted(shape) for shape in shapes if len(shape) == 2]
    return float(sum(5 * 2 * (2 * narrow**2 * wide + narrow**3) for narrow, wide in sides))


def solving_rows(found: Mapping[str, Solving], price: float | None) -> list[tuple[str, str]]:
    """The presets as label and value, for a table."""
    rows = []
    for name, each in found.items():
        hours, memory = _hours(each.device_hours), size(each.memory_bytes)
        said = f"at least {hours} on one device ({each.flops:.2g} FLOPs by count), {memory}"
        rows.append((f"--preset {name}", said + cost(each.device_hours, price)))
    return rows


def cost(device_hours: float, price: float | None) -> str:
    """`, 12.30 at 2.5 per device hour`; empty without a price."""
    return "" if price is None else f", {device_hours * price:,.2f} at {price:g} per device hour"


def solving_json(found: Mapping[str, Solving]) -> dict[str, dict[str, float]]:
    """The presets as JSON values."""
    return {name: each.to_json() for name, each in found.items()}


def _hours(hours: float) -> str:
    return f"{hours * 60:.2g} minutes" if hours < 1 else f"{hours:.2g} hours"
