"""Scores of lm-evaluation-harness's tasks while a model is trained."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gqa_convert.errors import UsageError
from gqa_convert.evaluate.tasks import find_tasks, run_on_model
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain.model import evaluating

if TYPE_CHECKING:
    from gqa_convert.uptrain.build import Parts
    from gqa_convert.uptrain.config import UptrainConfig
    from gqa_convert.uptrain.engine import Engine

_SETTING = "evaluation.tasks"


def check_tasks(config: UptrainConfig, engine: Engine) -> None:
    """Make sure before training that the tasks can be scored.

    Raises:
        UsageError: if lm-eval is not installed, knows no such task, or the engine cuts the model up.
    """
    if not config.evaluation.tasks:
        return
    if engine.name in ("fsdp2", "deepspeed"):
        raise UsageError(
            f"{_SETTING}: {engine.name} cuts the model up, and lm-eval runs whole ones. Leave the tasks out, and score "
            "`gqa uptrain export RUN` by `gqa eval --tasks`."
        )
    find_tasks(config.evaluation.tasks, option=_SETTING)


def score_tasks(parts: Parts) -> dict[str, float]:
    """Score the model as it is, on the main process; the others get the scores. Called by every process.

    Returns:
        By `TASK/METRIC`.

    Raises:
        UsageError: if lm-eval cannot run a task.
    """
    return parts.engine.from_main(lambda: _score(parts))


def _score(parts: Parts) -> dict[str, float]:
    settings = parts.plan.config.evaluation
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    source = Source.open(parts.plan.source, trust_remote_code=parts.plan.config.trust_remote_code)
    names, manager = find_tasks(settings.tasks, option=_SETTING)
    with evaluating(parts.plain), parts.engine.autocast():
        scores = run_on_model(
            parts.plain,
            source.tokenizer(),
            names,
            manager,
            limit=settings.tasks_limit,
            batch_size=parts.plan.config.train.micro_batch,
            option=_SETTING,
        )
    return {f"{task}/{metric}": value for task, metrics in scores.items() for metric, value in metrics.items()}
