"""The run from start to finish: resume, evaluate, step, save, stop when asked, write the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gqa_convert.checkpoint.fingerprint import sampled_digest
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError, Preempted, TrainingAborted, UsageError
from gqa_convert.outcome import Outcome
from gqa_convert.uptrain.averaging import WeightAverage
from gqa_convert.uptrain.build import build, load_reference
from gqa_convert.uptrain.checkpoints import CheckpointStore, SavedCheckpoint, open_checkpoint
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.evaluation import evaluate, evaluate_plain
from gqa_convert.uptrain.export import check_final, finish
from gqa_convert.uptrain.faults import clear_faults
from gqa_convert.uptrain.folder import run_folder
from gqa_convert.uptrain.guards import Guards
from gqa_convert.uptrain.plan import UptrainPlan, resolve
from gqa_convert.uptrain.progress import Display
from gqa_convert.uptrain.publish import check_push, push_final
from gqa_convert.uptrain.recorder import Recorder
from gqa_convert.uptrain.resume import check_same_run, checkpoint_state, unusable
from gqa_convert.uptrain.saving import Saver
from gqa_convert.uptrain.state import load_training_state
from gqa_convert.uptrain.step import StepResult, train_step
from gqa_convert.uptrain.stopping import StopRequest, stop_on_signals
from gqa_convert.uptrain.task_scores import check_tasks, score_tasks

_REACHED = "at target"
"""Under which the losses of a run keep that of the evaluation that met its target."""
_BEST, _BEST_STEP, _WORSE = "best", "best at step", "evaluations since"
"""And the lowest held-out loss, when it was, and how many evaluations there were since."""


@dataclass(frozen=True, kw_only=True)
class UptrainResult(Outcome):
    """A finished run.

    Attributes:
        folder: the result, a plain transformers folder.
        steps: taken or skipped, over all legs of the run.
        tokens: trained on.
        loss_before: held-out cross-entropy of the converted model, nats per token.
        loss_after: of the result.
        reference_loss: of the original; None if none was given.
        seconds: spent in steps, over all legs.
    """

    folder: Path
    steps: int
    tokens: int
    loss_before: float
    loss_after: float
    reference_loss: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self) | {"folder": str(self.folder)}


def uptrain(
    config: UptrainConfig, *, quiet: bool = False, on_progress: Callable[[str, int, int], None] | None = None
) -> UptrainResult:
    """Run, or go on with, an uptraining; `on_progress` is called with steps done, by the main process.

    Raises:
        Preempted: when asked to stop by SIGTERM or SIGUSR1, after saving.
        TrainingAborted: if the numbers go wrong.
        GQAConvertError: for anything wrong with configuration, data, model or disk.
    """
    plan = resolve(config)
    engine = Engine(config)
    display = Display(quiet=quiet or not engine.is_main, told=on_progress if engine.is_main else None)
    try:
        output = Path(config.output)
        with clear_faults(output), run_folder(output, engine), stop_on_signals() as stop, display:
            return _Run(plan, engine, display, stop).go()
    finally:
        engine.close()


class _Run:
    def __init__(self, plan: UptrainPlan, engine: Engine, display: Display, stop: StopRequest) -> None:
        self.plan, self.engine, self.display, self.stop = plan, engine, display, stop
        self.config = plan.config
        self.output = Path(self.config.output)
        self.store = CheckpointStore(self.output / "checkpoints", self.config.checkpoints.keep)
        self.guards = Guards(self.config.guards)
        self.average: WeightAverage | None = None
        self.step = 0
        self.seconds = 0.0
        self.losses: dict[str, float] = {}
        self._started = time.monotonic()

    def go(self) -> UptrainResult:
        self.display.say(
            f"engine {self.engine.name}, {self.engine.processes} processes, {self.engine.device}; "
            f"{self.plan.horizon.steps:,} steps"
        )
        self.engine.from_main(self._check_end)
        self.weights = self.engine.from_main(lambda: sampled_digest(Checkpoint.open(self.plan.source)))
        saved = self._checkpoint()
        state = saved.state() if saved else None
        if state:
            check_same_run(state, self.plan, self.weights)
        self.parts = build(
            self.plan,
            self.engine,
            tell=self.display.say,
            data_state=state["data"] if state else None,
            stopped=lambda: bool(self.stop),
        )
        try:
            self.recorder = Recorder(
                self.parts, self.output, self.display, resumed=int(state["step"]) if state else None
            )
            self.saver = Saver(self.parts, self.store, tell=self.display.say, event=self.recorder.event)
            if saved and state:
                self._resume(saved, state)
            else:
                self._start()
            try:
                self._train()
            except TrainingAborted:
                self.saver.settle()
                raise
            return self._finish()
        finally:
            if hasattr(self, "saver"):
                self.saver.close()
            self.parts.batches.close()
            if hasattr(self, "recorder"):
                self.recorder.close()

    def _check_end(self) -> None:
        """What would be found out in the end only, after days perhaps."""
        check_final(self.plan, self.output)
        check_tasks(self.config, self.engine)
        check_push(self.config)

    def _checkpoint(self) -> SavedCheckpoint | None:
        """The checkpoint to go on from, the same on every process: one reads and checks it for all."""
        saved = self.engine.from_main(self._find_checkpoint)
        if saved is not None and not saved.folder.is_dir():
            raise CheckpointError(
                f"{saved.folder}: process {self.engine.rank} does not see it. The output must be on storage that every "
                "machine sees."
            )
        return saved

    def _find_checkpoint(self) -> SavedCheckpoint | None:
        self.store.clean()
        wanted = self.config.checkpoints.resume
        if wanted == "never":
            if self.store.steps():
                raise UsageError(
                    f"{self.store.folder}: holds checkpoints of an earlier run. Use another output, or "
                    "checkpoints.resume=auto to go on from them."
                )
            return None
        if wanted != "auto":
            return open_checkpoint(Path(wanted), fault=unusable)
        return self.store.newest(self.display.say, fault=unusable)

    def _resume(self, saved: SavedCheckpoint, state: dict[str, Any]) -> None:
        load_training_state(saved.folder, self.parts.model, self.parts.optimizer)
        if self.config.averaging.decay is not None:
            self.average = WeightAverage(self.parts.model, self.config.averaging)
            if not self.average.resume(saved.folder, state.get("averaged")):
                self.display.say(f"{saved.folder.name} holds no average of the weights: one begins with it")
        self.guards.restore(state["guards"])
        self.step, self.seconds, self.losses = int(state["step"]), float(state["seconds"]), dict(state["losses"])
        self.saver.saved_step = self.step
        if self.config.evaluation.best and _BEST_STEP in self.losses:
            self.store.pinned = int(self.losses[_BEST_STEP])
        self.recorder.rewind(self.step)
        self.recorder.event(self.step, "resumed", processes=self.engine.processes, engine=self.engine.name)
        self.display.say(f"going on after step {self.step:,} from {saved.folder.name}")

    def _start(self) -> None:
        self.recorder.rewind(-1)
        reference = load_reference(self.plan, self.engine)
        if reference is None and self.parts.teacher is not None:
            reference = self.parts.teacher.model
        scored = None
        if reference is not None:
            scored = evaluate_plain(reference, self.parts.data, self.engine, micro=self.config.train.micro_batch)
        elif self.parts.cached is not None:
            scored = self.parts.cached.reference
        if scored is not None:
            self.losses["reference"] = scored["loss"]
            named = {name: loss for name, loss in scored.items() if name.startswith("loss/")}
            self.losses |= {name.replace("loss/", "reference/"): loss for name, loss in named.items()}
            self.display.say(f"held-out loss of the original: {self.losses['reference']:.4f}")
        del reference
        if self.config.averaging.decay is not None:
            self.average = WeightAverage(self.parts.model, self.config.averaging)
        self.losses["before"] = self._evaluate()
        self._score_tasks()
        self._compare(self.losses["before"])
        self._note_best(self.losses["before"])
        # A run that cannot save should fail now and not in a week.
        self._save(required=True)

    def _evaluate(self) -> float:
        """Score the weights that `final` is to be made of, and the others too where there is an average."""
        losses = self._score()
        weights = None
        if self.average is not None:
            with self.average.in_place():
                averaged = self._score()
            trained, weights = losses, "averaged" if self.config.averaging.final else "trained"
            losses = averaged if self.config.averaging.final else trained
            losses = losses | {"loss_trained": trained["loss"], "loss_averaged": averaged["loss"]}
        self.recorder.evaluation(
            self.step,
            losses,
            {name: loss for name, loss in self.losses.items() if name.startswith("reference")},
            weights=weights,
        )
        return losses["loss"]

    def _score(self) -> dict[str, float]:
        return evaluate(
            self.parts.scoring_model(),
            self.parts.data,
            self.engine,
            micro=self.config.train.micro_batch,
            teacher=self.parts.teacher,
        )

    def _score_tasks(self) -> None:
        """Score the tasks with the weights that `final` is to be made of."""
        if not self.config.evaluation.tasks:
            return
        averaged = self.average is not None and self.config.averaging.final
        with self.average.in_place() if self.average is not None and averaged else nullcontext():
            self.recorder.tasks(self.step, score_tasks(self.parts))

    def _train(self) -> None:
        total = self.plan.horizon.steps
        self.display.start(total, self.step)
        with self.recorder.profiler() as tick:
            while not self._ended():
                started = time.perf_counter()
                stop = bool(self.stop) or self._out_of_time()
                result = train_step(self.parts, self.guards, self.step, stop=stop, save=self._save_due())
                spent = time.perf_counter() - started
                self.step += 1
                self.seconds += spent
                if self.average is not None:
                    self.average.update(self.step)
                self.recorder.step(self.step, result, spent)
                tick()
                if self.step < total and self._evaluation_due():
                    loss = self._evaluate()
                    self._compare(loss)
                    self._note_best(loss)
                if self.step < total and self._passed(self.config.evaluation.tasks_every_tokens):
                    self._score_tasks()
                self._save_or_stop(result)

    def _ended(self) -> bool:
        """Whether all steps are done, the target is met, or patience is at its end."""
        patience = self.config.evaluation.patience
        tired = patience is not None and self.losses.get(_WORSE, 0) >= patience
        return self.step >= self.plan.horizon.steps or _REACHED in self.losses or tired

    def _out_of_time(self) -> bool:
        hours = self.config.train.max_hours
        return hours is not None and time.monotonic() - self._started >= 3600 * hours

    def _note_best(self, loss: float) -> None:
        """Remember the lowest held-out loss, keep its checkpoint if that is wanted, and count the others."""
        settings = self.config.evaluation
        if not settings.best and settings.patience is None:
            return
        if loss < self.losses.get(_BEST, math.inf):
            self.losses |= {_BEST: loss, _BEST_STEP: float(self.step), _WORSE: 0.0}
            if settings.best and self.step:
                before, self.store.pinned = self.store.pinned, self.step
                self._save(required=False)
                if self.saver.saved_step != self.step:
                    self.store.pinned = before
            return
        self.losses[_WORSE] = self.losses.get(_WORSE, 0.0) + 1
        if self._ended() and self.step < self.plan.horizon.steps:
            self.recorder.event(self.step, "patience ended", loss=loss, best=self.losses[_BEST])
            self.display.say(
                f"step {self.step:,}: {settings.patience} evaluations since the best, {self.losses[_BEST]:.4f} after "
                f"step {self.losses[_BEST_STEP]:,.0f}: the end"
            )

    def _compare(self, loss: float) -> None:
        """Note that the target is met; a checkpoint keeps the note, so that a resumed run does not go on either."""
        target, reference = self.config.evaluation.target, self.losses.get("reference")
        if target is not None and reference is not None and loss - reference <= target:
            self.losses[_REACHED] = loss
            self.recorder.event(self.step, "target met", loss=loss, reference=reference)
            self.display.say(f"step {self.step:,}: within {target:g} nats per token of the original: the end")

    def _evaluation_due(self) -> bool:
        settings, batch = self.config.evaluation, self.plan.horizon.batch_tokens
        before, now = (self.step - 1) * batch, self.step * batch
        return self._passed(settings.every_tokens) or any(before < at <= now for at in settings.at_tokens)

    def _passed(self, every: int | None) -> bool:
        """Whether the last step has come past a multiple of so many tokens."""
        batch = self.plan.horizon.batch_tokens
        return bool(every and self.step * batch // every > (self.step - 1) * batch // every)

    def _save_due(self) -> bool:
        settings, done = self.config.checkpoints, self.step + 1
        if settings.every_steps and done % settings.every_steps == 0:
            return True
        waited = time.monotonic() - self.saver.saved_at
        return bool(settings.every_minutes and waited >= 60 * settings.every_minutes)

    def _save_or_stop(self, result: StepResult) -> None:
        finished = self._ended()
        if result.stop and not finished:
            self._save(required=True)
            by_clock = "the clock (train.max_hours)" if self._out_of_time() else "a signal to another process"
            name = self.stop.signal.name if self.stop.signal else by_clock
            raise Preempted(f"stopped by {name} after step {self.step:,}, saved. Run the same command again to go on.")
        if result.save or finished:
            self._save(required=False, beside=self.config.checkpoints.asynchronous and not finished)
        else:
            self.saver.look()

    def _save(self, *, required: bool, beside: bool = False) -> None:
        """Save; a failure is survived a few times unless it is `required` that this one succeeds.

        Args:
            required: stop if it fails.
            beside: write while training goes on.
        """
        values = None if self.average is None else self.average.values
        self.saver.save(self.step, self._state, required=required, beside=beside, average=values)

    def _state(self, data: dict[str, Any]) -> dict[str, Any]:
        return checkpoint_state(
            self.plan,
            weights=self.weights,
            step=self.step,
            data=data,
            guards=self.guards.state(),
            losses=self.losses,
            seconds=self.seconds,
            engine=self.engine,
            averaged=None if self.average is None else self.average.updates,
        )

    def _settle_final(self, after: float) -> float:
        """Put the weights in the model that `final` is to be made of; returns their held-out loss."""
        average = self.config.checkpoints.average
        if average is not None:
            steps = self.store.steps()[-average:]
            self._load_mean(steps)
            self.display.say(f"final is the mean of the checkpoints of steps {', '.join(map(str, steps))}")
            return self._evaluate()
        best = self.losses.get(_BEST, math.inf)
        if not self.config.evaluation.best or after <= best:
            self._put_average_in()
            return after
        step = int(self.losses[_BEST_STEP])
        saved = self.engine.from_main(lambda: open_checkpoint(self.store.path(step), fault=unusable))
        load_training_state(saved.folder, self.parts.model, None)
        if self.average is not None:
            self.average.resume(saved.folder, saved.state().get("averaged"))
        self._put_average_in()
        self.display.say(f"final is the checkpoint of step {step:,}, whose held-out loss was the lowest ({best:.4f})")
        return best

    def _put_average_in(self) -> None:
        if self.average is not None and self.config.averaging.final:
            self.average.put_in()
            self.display.say(f"final is made of the averaged weights ({self.average.updates:,} updates)")

    def _load_mean(self, steps: Sequence[int]) -> None:
        """Fill the trained parameters with their mean over checkpoints, one of them in memory at a time."""
        if self.engine.name == "deepspeed":
            raise UsageError("checkpoints.average: DeepSpeed's checkpoints cannot be averaged here. Use FSDP2 or DDP.")
        sums: list[torch.Tensor] = []
        for step in steps:
            path = self.store.path(step)
            saved = self.engine.from_main(lambda path=path: open_checkpoint(path, fault=unusable))  # type: ignore[misc]
            load_training_state(saved.folder, self.parts.model, None)
            now = [parameter.detach().clone() for parameter in self.parts.trained]
            sums = [total + value for total, value in zip(sums, now, strict=True)] if sums else now
        with torch.no_grad():
            for parameter, total in zip(self.parts.trained, sums, strict=True):
                parameter.copy_(total / len(steps))

    def _finish(self) -> UptrainResult:
        after = self._evaluate()
        after = self._settle_final(after)
        if self.config.evaluation.tasks:
            self.recorder.tasks(self.step, score_tasks(self.parts))
        self.display.stop()
        folder = finish(self.parts, self.output, losses={**self.losses, "after": after}, seconds=self.seconds)
        address = self.engine.from_main(lambda: push_final(self.config, folder))
        if address is not None:
            self.display.say(f"sent to the hub: {address}")
        return UptrainResult(
            folder=folder,
            steps=self.step,
            tokens=self.step * self.plan.horizon.batch_tokens,
            loss_before=self.losses["before"],
            loss_after=after,
            reference_loss=self.losses.get("reference"),
            seconds=self.seconds,
        )
