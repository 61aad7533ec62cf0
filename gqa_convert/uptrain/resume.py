"""What a checkpoint says beside weights, and whether a configuration may go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.provenance import versions
from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.uptrain.checkpoints import STATE, SavedCheckpoint
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.plan import UptrainPlan
from gqa_convert.uptrain.state import training_state_problem


def identity(plan: UptrainPlan, weights: str) -> dict[str, Any]:
    """What a run cannot change half way: it decides which tokens come next and what is trained.

    Args:
        plan: the run.
        weights: sampled digest of the converted model. A model converted anew in the same folder starts a new run:
            resuming would drop it without a word, or mix it with the old one where some parameters are frozen.
    """
    config = plan.config
    data = config.data.model_dump(mode="json", exclude={"cache", "held_out_source", "processes"})
    for name, default in _NEWER.items():  # an older version's checkpoints know no such setting
        if data[name] == default:
            del data[name]
    return {
        "parameters": plan.shape.parameters,
        "model_weights": weights,
        "data": data,
        "objective": config.objective.kind,
        "optimizer": config.optimizer.kind,
        "batch_sequences": config.train.batch_sequences,
        "seed": config.train.seed,
        "trains": config.train.parameters,
    }


_NEWER: dict[str, Any] = {
    "loss_on": "assistant",
    "packing": "auto",
    "sources": [],
    "streams": None,
    "held_out_by": "auto",
}


def checkpoint_state(
    plan: UptrainPlan,
    *,
    weights: str,
    step: int,
    data: dict[str, Any],
    guards: dict[str, Any],
    losses: dict[str, float],
    seconds: float,
    engine: Engine,
    averaged: int | None = None,
) -> dict[str, Any]:
    """`state.json` of a checkpoint: where the run is, in numbers."""
    return {
        "step": step,
        "tokens": step * plan.horizon.batch_tokens,
        "identity": identity(plan, weights),
        "config": plan.config.model_dump(mode="json"),
        "data": data,
        "guards": guards,
        "losses": losses,
        "seconds": seconds,
        "engine": engine.name,
        "processes": engine.processes,
        **({} if averaged is None else {"averaged": averaged}),
        "versions": versions("gqa-convert", "torch", "transformers", "accelerate"),
    }


def unusable(folder: Path) -> str | None:
    """Say what keeps an undamaged checkpoint from being resumed; None if nothing does. Reads little of it."""
    try:
        state = SavedCheckpoint(folder, 0).state()
    except CheckpointError as error:
        return str(error)
    for key, kind in _KINDS.items():
        if not isinstance(state.get(key), kind):
            return f"its {STATE} has no {key}"
    guards, losses = state["guards"], state["losses"]
    if not all(_numbers(guards.get(key)) for key in ("losses", "norms")):
        return f"its {STATE} does not say what the guards remember"
    if not all(type(guards.get(key)) is int for key in ("in_a_row", "skipped")):
        return f"its {STATE} does not say what the guards remember"
    if "before" not in losses or not _numbers(list(losses.values())):
        return f"its {STATE} has no held-out losses"
    return training_state_problem(folder)


_KINDS: dict[str, Any] = {"identity": dict, "data": dict, "guards": dict, "losses": dict, "seconds": (int, float)}


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def check_same_run(state: dict[str, Any], plan: UptrainPlan, weights: str) -> None:
    """Make sure that a checkpoint belongs to this configuration.

    Raises:
        UsageError: naming every setting that differs.
    """
    now = identity(plan, weights)
    changed = [
        f"{key} was {state['identity'].get(key)!r} and is {value!r}"
        for key, value in now.items()
        if state["identity"].get(key) != value
    ]
    if changed:
        raise UsageError(
            f"step {state['step']}: the checkpoint belongs to a different run: {'; '.join(changed)}. "
            "Put the settings or the model back, or choose another output."
        )
