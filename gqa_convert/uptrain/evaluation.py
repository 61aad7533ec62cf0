"""Held-out loss: the model's own, and the original's as the line to reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gqa_convert.data.batches import evaluation_batches
from gqa_convert.uptrain.corpus import TrainingData
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.model import ScoredModel, Teacher, evaluating
from gqa_convert.uptrain.objective import LossSpec


@torch.no_grad()
def evaluate(
    model: nn.Module, data: TrainingData, engine: Engine, *, micro: int, teacher: Teacher | None = None
) -> dict[str, float]:
    """Score the held-out blocks, shared out over the processes.

    Returns:
        `loss` (cross-entropy), with a teacher `kl`: nats per token; `tokens` scored.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    batches = evaluation_batches(
        data.held_out, data.collate_held_out, micro=micro, processes=engine.processes, rank=engine.rank
    )
    with evaluating(model):
        for batch in batches:
            moved = batch.to(engine.device)
            with engine.autocast():
                taught = teacher(moved.inputs) if teacher is not None else None
                _, terms = model(moved.inputs, moved.labels, taught)
            sums += torch.tensor([*terms[:2].tolist(), float(batch.valid)], dtype=torch.float64)
    ce, kl, tokens = engine.sum(sums.to(engine.device)).tolist()
    result = {"loss": ce / tokens, "tokens": tokens}
    if teacher is not None:
        result["kl"] = kl / tokens
    return result


def evaluate_plain(model: Any, data: TrainingData, engine: Engine, *, micro: int) -> float:
    """Cross-entropy of a model that is not trained here."""
    # Evaluating puts a module back as it was: a new wrapper would wake the dropout of a teacher.
    scored = ScoredModel(model, LossSpec()).to(engine.device).eval()
    return evaluate(scored, data, engine, micro=micro)["loss"]
