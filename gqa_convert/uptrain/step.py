"""One optimisation step: accumulate, normalise by all scored positions of all processes, clip, judge, move."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gqa_convert.uptrain import optim
from gqa_convert.uptrain.build import Parts
from gqa_convert.uptrain.guards import Guards
from gqa_convert.uptrain.objective import STATISTICS
from gqa_convert.uptrain.state import seed_step


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step's numbers, the same on every process.

    Attributes:
        loss: what was minimised, per scored position.
        parts: its terms by `STATISTICS`, unweighted, per scored position.
        norm: of the gradient before clipping.
        rate: learning rate.
        taken: False if the step was skipped as a spike.
        stop: some process was asked to stop.
        save: the main process wants a checkpoint.
    """

    loss: float
    parts: dict[str, float]
    norm: float
    rate: float
    taken: bool
    stop: bool
    save: bool


def train_step(parts: Parts, guards: Guards, step: int, *, stop: bool, save: bool) -> StepResult:
    """Run step number `step` (from 0).

    The gradient is that of the loss summed over all positions of the step, divided by their number over all processes:
    engines average over processes, so each multiplies by how many there are.

    Args:
        parts: the run.
        guards: judge the step before it is taken.
        step: which one.
        stop: this process was asked to stop.
        save: a checkpoint is due (the main process's clock decides).

    Raises:
        TrainingAborted: from the guards.
    """
    engine, plan = parts.engine, parts.plan
    batches = parts.batches.step(step)
    valid = engine.sum_of(float(sum(batch.valid for batch in batches)))
    scale = engine.processes / max(valid, 1.0)
    seed_step(plan.config.train.seed, step, engine.rank)
    sums = torch.zeros(len(STATISTICS) + 3, dtype=torch.float32, device=engine.device)
    for number, batch in enumerate(batches):
        moved = batch.to(engine.device)
        last = number == len(batches) - 1
        with engine.accumulating(parts.model, last=last):
            with engine.autocast():
                taught = parts.taught(moved)
                loss, statistics = parts.model(moved.inputs, moved.labels, taught)
            engine.backward(parts.model, loss * scale, last=last)
        sums[: len(STATISTICS)] += statistics
        sums[-3] += loss.detach()
    sums[-2], sums[-1] = float(stop), float(save)
    engine.sum(sums)
    norm = engine.clip(parts.trained, plan.config.optimizer.clip)
    # The one place where the processor waits for the device.
    *terms, total, stops, saves, length = torch.cat([sums, norm.detach().float().reshape(1).to(sums.device)]).tolist()
    share = 1.0 / max(valid, 1.0)
    taken = guards.accepts(step=step + 1, loss=total * share, norm=length)
    rate = plan.schedule((step + 1) * plan.horizon.batch_tokens)
    optim.set_learning_rate(parts.optimizer, rate)
    engine.move(parts.model, parts.optimizer, taken=taken)
    return StepResult(
        loss=total * share,
        parts={name: value * share for name, value in zip(STATISTICS, terms, strict=True)},
        norm=length,
        rate=rate,
        taken=taken,
        stop=stops > 0,
        save=saves > 0,
    )
