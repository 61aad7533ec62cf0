"""Tasks of lm-evaluation-harness (the `eval` extra), local or from the hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gqa_convert.errors import UsageError
from gqa_convert.evaluate import models

Scores = dict[str, dict[str, float]]
"""Metric values by task; standard errors under `<metric>_stderr`."""


def run_tasks(
    names: Sequence[str],
    subjects: Sequence[models.Subject],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Scores]:
    """Run lm-eval tasks on several models, one in memory at a time.

    Args:
        names: names that lm-eval knows, or paths of YAML files that define one task each.
        subjects: the models.
        limit: examples per task; None for all.
        batch_size: examples run at a time.
        dtype: see `models.load`.
        device: see `models.load`.

    Raises:
        UsageError: if lm-eval is not installed, or a task is unknown or cannot be loaded.
    """
    tasks, manager = find_tasks(names)
    return {subject.name: _run(subject, tasks, manager, limit, batch_size, dtype, device) for subject in subjects}


def find_tasks(names: Sequence[str], *, option: str = "--tasks") -> tuple[list[str], Any]:
    """The tasks' names, and lm-eval's manager that knows them.

    Args:
        names: as for `run_tasks`.
        option: what messages call them.

    Raises:
        UsageError: if lm-eval is not installed, or there is no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"{option} runs lm-evaluation-harness: pip install 'gqa-convert[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"{option} {missing[0]}: no such file.")
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    task_names = [_task_name(Path(name), option) if Path(name) in files else name for name in names]
    unknown = [name for name in task_names if name not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"{option} {unknown[0]}: lm-eval knows no such task. `lm-eval ls tasks` lists them; a task of your own is "
            "a path that ends in .yaml."
        )
    return task_names, manager


def _task_name(file: Path, option: str) -> str:
    import yaml

    # Tasks may use tags of lm-eval's own (`!function`), which a plain loader refuses; only the name is wanted here.
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            return str(yaml.safe_load(line)["task"])
    raise UsageError(f"{option} {file}: has no `task:` line with the task's name.")


def _run(
    subject: models.Subject,
    tasks: list[str],
    manager: Any,
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: str,
) -> Scores:
    model = models.load(subject, dtype=dtype, device=device)
    return run_on_model(model, subject.source.tokenizer(), tasks, manager, limit=limit, batch_size=batch_size)


def run_on_model(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    manager: Any,
    *,
    limit: int | None,
    batch_size: int,
    option: str = "--tasks",
) -> Scores:
    """Run tasks that `find_tasks` has found on a model that is in memory.

    Raises:
        UsageError: if a task cannot be run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        outcome = lm_eval.simple_evaluate(
            model=wrapped, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    except (FileNotFoundError, ConnectionError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{option} {','.join(tasks)}: lm-eval could not run them ({type(error).__name__}: {why})."
        ) from error
    return {task: _numbers(metrics) for task, metrics in outcome["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Turn `acc,none` into `acc` and leave out what is no number; another filter than `none` stays in the name."""
    kept = {}
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, (int, float)) and not isinstance(value, bool):
            kept[metric if filtered == "none" else f"{metric} ({filtered})"] = float(value)
    return kept
