"""Saving a run: at once, or by a thread beside the steps that follow, of a copy in the host's memory.

Either way a checkpoint counts only once every process has written its part and the first one has described and renamed
it. What processes tell each other of a save, they tell at the end of a step, all of them or none: a thread that did so
by itself would come between the training's own exchanges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_convert.data.strided import merged
from gqa_convert.errors import OutputError
from gqa_convert.uptrain.build import Parts
from gqa_convert.uptrain.checkpoints import CheckpointStore, disk_problem
from gqa_convert.uptrain.state import copied_state, is_sharded, save_training_state

State = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes `state.json` of where the data are."""


@dataclass
class _Pending:
    """A save that is under way: first every process writes its part, then the first one commits."""

    step: int
    state: dict[str, Any]
    work: Future[Any]
    committing: bool = field(default=False)


class Saver:
    """Saves a run into its store. Called by every process, at the same places.

    Attributes:
        saved_step: of the newest checkpoint that was saved; -1 before the first.
        saved_at: when the last save began, on the monotonic clock.
    """

    def __init__(
        self, parts: Parts, store: CheckpointStore, *, tell: Callable[[str], None], event: Callable[..., None]
    ) -> None:
        self._parts, self._store, self._tell, self._event = parts, store, tell, event
        self._engine = parts.engine
        self._settings = parts.plan.config.checkpoints
        self.saved_step = -1
        self.saved_at = time.monotonic()
        self._failures = 0
        self._pending: _Pending | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._group: Any | None = None
        if self._settings.asynchronous:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
            if is_sharded(parts.model):
                self._group = torch.distributed.new_group(backend="gloo")

    def save(
        self, step: int, state: State, *, required: bool, beside: bool, average: Mapping[str, Tensor] | None
    ) -> None:
        """Save; a failure is survived a few times unless it is `required` that this one succeeds.

        Args:
            step: that was done last.
            state: makes `state.json`.
            required: stop if it fails.
            beside: return as soon as there is a copy, and write that while training goes on.
            average: of the weights, if there is one.

        Raises:
            OutputError: if it failed, and too often.
        """
        self.settle()
        if self.saved_step == step:
            return
        self.saved_at = time.monotonic()
        self._parts.batches.settle()
        block = step * self._parts.plan.config.train.batch_sequences
        described = state(merged(self._engine.gather(self._parts.data.state(block))))
        problem = self._together(lambda: self._store.begin(step) if self._engine.is_main else None)
        if problem is None and beside and self._thread is not None:
            copies: list[Callable[[Path], None]] = []
            problem = self._together(lambda: copies.append(self._copied(average)))
            if problem is None:
                self._pending = _Pending(step, described, self._thread.submit(copies[0], self._store.stage(step)))
                return
        elif problem is None:
            problem = self._write_and_commit(step, described, average)
        self._judge(step, problem, required=required)

    def look(self) -> None:
        """Go on with a save that is under way, if all processes have done their part of it by now.

        Raises:
            OutputError: if it failed, as too many before it.
        """
        self._advance(waiting=False)

    def settle(self) -> None:
        """Wait for a save that is under way.

        Raises:
            OutputError: if it failed, as too many before it.
        """
        self._advance(waiting=True)

    def close(self) -> None:
        """Let the thread end. What it was writing counts only if no other process had to be asked."""
        if self._thread is None:
            return
        try:
            if self._engine.processes == 1:
                self.settle()
        finally:
            self._thread.shutdown(wait=True)

    def _copied(self, average: Mapping[str, Tensor] | None) -> Callable[[Path], None]:
        parts, main = self._parts, self._engine.is_main
        return copied_state(parts.model, parts.optimizer, is_main=main, average=average, group=self._group)

    def _advance(self, *, waiting: bool) -> None:
        while self._pending is not None:
            pending = self._pending
            if waiting:
                wait([pending.work])
            if self._engine.sum_of(float(not pending.work.done())):
                return
            problem = self._together(pending.work.result)
            if problem is not None or pending.committing:
                self._pending = None
                self._judge(pending.step, problem, required=False)
                return
            assert self._thread is not None
            commit = self._store.commit if self._engine.is_main else _nothing
            pending.work, pending.committing = self._thread.submit(commit, pending.step, pending.state), True
            if not waiting:
                return

    def _write_and_commit(
        self, step: int, state: dict[str, Any], average: Mapping[str, Tensor] | None
    ) -> Exception | None:
        parts, main = self._parts, self._engine.is_main
        stage = self._store.stage(step)
        problem = self._together(
            lambda: save_training_state(stage, parts.model, parts.optimizer, is_main=main, average=average)
        )
        return problem or self._together(lambda: self._store.commit(step, state) if main else None)

    def _together(self, work: Callable[[], Any]) -> Exception | None:
        """Do something on all processes; returns what went wrong (on any of them) instead of raising it."""
        problem: Exception | None = None
        try:
            work()
        except Exception as error:  # a full disk shows as OSError, RuntimeError (torch) or SafetensorError
            problem = error
        if self._engine.sum_of(float(problem is not None)):
            return problem or OutputError("another process could not write")
        return None

    def _judge(self, step: int, problem: Exception | None, *, required: bool) -> None:
        if problem is None:
            self._failures, self.saved_step = 0, step
            return
        if self._engine.is_main:
            self._store.abandon(step)
        self._failures += 1
        self._event(step, "save failed", reason=str(problem))
        self._tell(f"step {step:,}: the checkpoint could not be saved ({problem}); going on without")
        if required or self._failures > self._settings.failures_allowed:
            cause = problem if isinstance(problem, OSError) else OSError(str(problem))
            raise disk_problem(cause, self._store.folder)


def _nothing(*_: Any) -> None:
    pass
