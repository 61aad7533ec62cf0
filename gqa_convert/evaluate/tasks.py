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
    tasks, manager = _find(names)
    return {subject.name: _run(subject, tasks, manager, limit, batch_size, dtype, device) for subject in subjects}


def _find(names: Sequence[str]) -> tuple[list[str], Any]:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("--tasks runs lm-evaluation-harness: pip install 'gqa-convert[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"--tasks {missing[0]}: no such file.")
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    task_names = [_task_name(Path(name)) if Path(name) in files else name for name in names]
    unknown = [name for name in task_names if name not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"--tasks {unknown[0]}: lm-eval knows no such task. `lm-eval ls tasks` lists them; a task of your own is a "
            "path that ends in .yaml."
        )
    return task_names, manager


def _task_name(file: Path) -> str:
    import yaml

    # Tasks may use tags of lm-eval's own (`!function`), which a plain loader refuses; only the name is wanted here.
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            return str(yaml.safe_load(line)["task"])
    raise UsageError(f"--tasks {file}: has no `task:` line with the task's name.")


def _run(
    subject: models.Subject,
    tasks: list[str],
    manager: Any,
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: str,
) -> Scores:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = models.load(subject, dtype=dtype, device=device)
    tokenizer = subject.source.tokenizer()
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        outcome = lm_eval.simple_evaluate(
            model=wrapped, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    except (FileNotFoundError, ConnectionError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--tasks {','.join(tasks)}: lm-eval could not run them ({type(error).__name__}: {why})."
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
