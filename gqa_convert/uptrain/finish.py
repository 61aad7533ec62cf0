"""From the trained state to the final folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from gqa_convert.uptrain import optim
from gqa_convert.uptrain.build import Parts
from gqa_convert.uptrain.final import write_final
from gqa_convert.uptrain.state import gather_weights

_PREFIXES = ("_orig_mod.", "module.")


def finish(parts: Parts, output: Path, *, losses: dict[str, float], seconds: float) -> Path:
    """Gather the weights on the main process and write `<output>/final`. Called by every process.

    Raises:
        OutputError: if it cannot be written; checkpoints are there to try again from.
        VerificationError: if what was written is not what the source promised.
    """
    target = output / "final"
    plain = parts.plain
    if parts.plan.config.train.parameters == "lora":
        plain = optim.merged_model(plain)
        weights = gather_weights(plain)
    else:
        weights = {_plain_name(name): value for name, value in gather_weights(parts.scoring_model()).items()}
    if parts.engine.is_main:
        write_final(
            plain,
            weights,
            source=parts.plan.source,
            target=target,
            uptraining=provenance(parts, losses, seconds),
            trust_remote_code=parts.plan.config.trust_remote_code,
        )
    parts.engine.wait()
    return target


def _plain_name(name: str) -> str:
    """The transformers model's own name of a parameter of the wrapped one."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name.removeprefix("model.")


def provenance(parts: Parts, losses: dict[str, float], seconds: float) -> dict[str, Any]:
    """What `gqa_convert.json` says of the training. Names no path: they mean nothing elsewhere."""
    plan = parts.plan
    config = plan.config.model_dump(mode="json")
    for section, key in (("data", "cache"), ("data", "source"), ("data", "held_out_source"), ("log", "project")):
        config[section].pop(key, None)
    source = plan.config.data.source
    config["data"]["source"] = {"kind": source.kind, "names": [Path(path).name for path in source.paths]}
    if source.kind == "hub":
        config["data"]["source"] = source.model_dump(mode="json")
    for key in ("model", "output", "expect", "checkpoints", "log", "evaluation"):
        config.pop(key, None)
    distillation = config["objective"].get("distillation")
    if distillation:
        distillation["teacher"] = Path(distillation["teacher"]).name
    return {
        "config": config,
        "steps": plan.horizon.steps,
        "tokens": plan.horizon.tokens,
        "alpha": plan.horizon.alpha,
        "flops": plan.budget.flops,
        "held_out_loss": losses,
        "seconds": round(seconds, 1),
        "engine": parts.engine.name,
        "processes": parts.engine.processes,
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers", "accelerate")},
    }
