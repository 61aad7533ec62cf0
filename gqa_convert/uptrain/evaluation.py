"""Held-out loss: the model's own, and the original's as the line to reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.data.batches import evaluation_batches
from gqa_convert.data.blocks import Block
from gqa_convert.errors import UsageError
from gqa_convert.uptrain.corpus import TrainingData
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.model import ScoredModel, Teacher, evaluating
from gqa_convert.uptrain.objective import LossSpec
from gqa_convert.uptrain.sharded_loading import reshard


@torch.no_grad()
def evaluate(
    model: nn.Module, data: TrainingData, engine: Engine, *, micro: int, teacher: Teacher | None = None
) -> dict[str, float]:
    """Score the held-out blocks, shared out over the processes.

    Returns:
        `loss` (cross-entropy), with a teacher `kl`: nats per token; `tokens` scored. Where there is more than one set,
        `loss/NAME` and `kl/NAME` of each too; those without a name are of the main ones together.
    """
    main = torch.zeros(3, dtype=torch.float64)
    result: dict[str, float] = {}
    for held in data.sets:
        sums = _score(model, held.blocks, data, engine, micro, teacher)
        if held.main:
            main += sums
        if len(data.sets) > 1 and held.name:
            result |= _means(sums, f"/{held.name}", teacher)
    tokens = {"tokens": float(main[2])}
    return _means(main, "", teacher) | tokens | result


def _score(
    model: nn.Module,
    blocks: list[tuple[Block, int]],
    data: TrainingData,
    engine: Engine,
    micro: int,
    teacher: Teacher | None,
) -> Tensor:
    """Sums of cross-entropy and KL, and tokens, float64."""
    sums = torch.zeros(3, dtype=torch.float64)
    batches = evaluation_batches(
        blocks, data.collate_held_out, micro=micro, processes=engine.processes, rank=engine.rank
    )
    with evaluating(model):
        for batch in batches:
            moved = batch.to(engine.device)
            with engine.autocast():
                taught = teacher(moved.inputs) if teacher is not None else None
                _, terms = model(moved.inputs, moved.labels, taught)
            sums += torch.tensor([*terms[:2].tolist(), float(batch.valid)], dtype=torch.float64)
    reshard(model)
    return engine.sum(sums.to(engine.device)).cpu()


def _means(sums: Tensor, suffix: str, teacher: Teacher | None) -> dict[str, float]:
    ce, kl, tokens = sums.tolist()
    if not tokens:
        which = f" {suffix[1:]}" if suffix else ""
        raise UsageError(
            f"data: the held-out set{which} holds no token to be predicted (no turn of an assistant's?). Hold out more."
        )
    means = {f"loss{suffix}": ce / tokens}
    return means | {f"kl{suffix}": kl / tokens} if teacher is not None else means


def evaluate_plain(model: Any, data: TrainingData, engine: Engine, *, micro: int) -> dict[str, float]:
    """Cross-entropy of a model that is not trained here, as `evaluate` gives it."""
    # Evaluating puts a module back as it was: a new wrapper would wake the dropout of a teacher.
    scored = ScoredModel(model, LossSpec()).to(engine.device).eval()
    return evaluate(scored, data, engine, micro=micro)
