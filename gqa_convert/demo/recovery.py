"""The second half of the demo: uptrain the converted model for about as long as one is willing to watch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.embedded import CHECKPOINT

CONTEXT = 256
SEQUENCES = 4
MOST_STEPS = 200
FEWEST_STEPS = 4
_TEXTS = "gqa_convert.data.stdlib"


@dataclass(frozen=True, kw_only=True)
class Uptrained:
    """A finished uptraining: the folder it left, its steps and tokens, and the seconds spent in steps."""

    folder: Path
    steps: int
    tokens: int
    seconds: float


def uptrain_for(converted: Path, work: Path, *, seconds: float, quiet: bool) -> Uptrained:
    """Uptrain a converted embedded checkpoint for about `seconds`, on the text it was pretrained on.

    The original teaches it (distillation alone): from a good start that wins back more than the text does.

    The number of steps is fixed beforehand, from how long one takes here, because the learning rate ends with them.

    Raises:
        GQAConvertError: from the uptraining.
    """
    from gqa_convert.uptrain.loop import uptrain
    from gqa_convert.uptrain.read_config import parse_config

    steps = max(FEWEST_STEPS, min(MOST_STEPS, int(seconds / _step_seconds(converted))))
    done = uptrain(parse_config(settings(converted, work, steps), where="demo"), quiet=quiet)
    return Uptrained(folder=done.folder, steps=done.steps, tokens=done.tokens, seconds=round(done.seconds, 1))


def settings(converted: Path, work: Path, steps: int) -> dict[str, Any]:
    """The uptraining as `gqa uptrain` would read it from a file. See configs/embedded.yaml for a longer one."""
    return {
        "model": str(converted),
        "output": str(work / "uptrained"),
        "budget": {"steps": steps},
        "data": {
            "source": {"kind": "python", "paths": [f"{_TEXTS}:some_training_texts"]},
            "held_out_source": {"kind": "python", "paths": [f"{_TEXTS}:some_held_out_texts"]},
            "context": CONTEXT,
            "special_tokens": False,
            "separate_documents": False,
        },
        "objective": {"distillation": {"teacher": str(CHECKPOINT), "weight": 1.0, "cross_entropy_weight": 0.0}},
        "schedule": {"kind": "cosine", "peak": 5e-4, "warmup_fraction": 0.1},
        "train": {"batch_sequences": SEQUENCES, "micro_batch": SEQUENCES, "precision": "float32", "device": "cpu"},
        "checkpoints": {"every_steps": MOST_STEPS},
        "evaluation": {"tokens": 4096},
        "log": {"trackers": []},
    }


def _step_seconds(folder: Path) -> float:
    """Time of one optimiser step on this machine, the second of two."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    ids_BT = torch.randint(4, model.config.vocab_size, (SEQUENCES, CONTEXT))
    taken = 0.0
    for _ in range(2):
        started = time.perf_counter()
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        taken = time.perf_counter() - started
    return taken
