"""Pretraining and uptraining, both by the package's own loop; the second goes on where the first stopped.

The learning rate of an uptraining continues the pretraining's schedule, on the same text in a new order, with a fresh
optimiser (a merged weight has no history). Every arm of a seed, the control too, sees the same tokens in one order.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stopwatch import Stopwatch

if TYPE_CHECKING:
    from scales import Scale

UPTRAINING_ORDER = 1000
"""Added to the seed, so that uptraining meets the text in another order than pretraining."""


def settings(
    scale: Scale, family: str, *, model: Path, output: Path, seed: int, start_step: int, steps: int
) -> dict[str, Any]:
    """The configuration of a run, as `gqa uptrain` takes it."""
    optimiser = scale.optimiser
    warmup = optimiser.warmup_steps * scale.batch_tokens if start_step == 0 else 0
    return {
        "model": str(model),
        "output": str(output),
        "trust_remote_code": False,
        "budget": {"steps": steps},
        "data": {
            "source": {"kind": "python", "paths": [f"sources:{scale.text}_training"]},
            "held_out_source": {"kind": "python", "paths": [f"sources:{scale.text}_held_out"]},
            "held_out_fraction": 0.0,
            "context": scale.context,
            "special_tokens": False,
            "append_eos": True,
            "separate_documents": False,
        },
        "objective": {"kind": "span_corruption" if family == "t5" else "causal_lm"},
        "optimizer": {"kind": optimiser.kind},
        "schedule": {
            "kind": "inverse_sqrt",
            "peak": optimiser.rate * math.sqrt(optimiser.offset),
            "offset": optimiser.offset,
            "start_step": start_step,
            "warmup_tokens": warmup,
        },
        "train": {
            "batch_sequences": scale.batch,
            "micro_batch": scale.batch,
            "precision": scale.precision,
            "device": scale.device,
            "seed": seed,
        },
        "guards": {"spike_factor": None},
        "checkpoints": {"every_minutes": 2.0},
        "evaluation": {"tokens": scale.held_out_tokens},
        "log": {"trackers": [], "every_steps": 50},
    }


def train(config: dict[str, Any], *, marks: list[int], keep_model: bool) -> dict[str, Any]:
    """Run, or go on with, a training; the held-out loss is taken before the first step and after each of `marks` steps.

    Returns:
        `curve`: pairs of tokens and loss; `seconds` of work (see `stopwatch`) in steps.
    """
    from gqa_convert.uptrain.loop import uptrain
    from gqa_convert.uptrain.metrics import read_metrics
    from gqa_convert.uptrain.read_config import parse_config

    each = config["train"]["batch_sequences"] * config["data"]["context"]
    config = config | {"evaluation": config["evaluation"] | {"at_tokens": [mark * each for mark in marks]}}
    output = Path(config["output"])
    watch = Stopwatch(config["train"]["device"])
    result = uptrain(parse_config(config), quiet=True)
    share = watch.share
    records = [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "evaluation"]
    curve = {record["step"] * each: record["held_out_loss"] for record in records}
    shutil.rmtree(output / "checkpoints")
    if not keep_model:
        shutil.rmtree(output / "final")
    return {"curve": sorted(curve.items()), "seconds": round(share * result.seconds, 2)}
