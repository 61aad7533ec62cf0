"""Everything a run says about itself while it goes: display, metrics.jsonl, trackers, profile."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gqa_convert.budget.shape import peak_flops
from gqa_convert.uptrain.build import Parts
from gqa_convert.uptrain.metrics import MetricsFile, chosen_trackers, flat_config
from gqa_convert.uptrain.progress import Display
from gqa_convert.uptrain.step import StepResult
from gqa_convert.uptrain.trackers import Trackers

_PROFILED = (3, 5)
"""First and last step (from 1) of the profile: after compilation and the first allocations."""


class Recorder:
    """Only the main process's recorder writes; the others' do nothing."""

    def __init__(self, parts: Parts, output: Path, display: Display, *, resumed: int | None) -> None:
        self._parts, self._output, self._display = parts, output, display
        self._active = parts.engine.is_main
        self._file = MetricsFile(output / "metrics.jsonl")
        self._every = parts.plan.config.log.every_steps
        self._pending_seconds, self._pending_steps = 0.0, 0
        self._last = time.perf_counter()
        self._flops = parts.plan.shape.training_flops_per_token(parts.plan.config.data.context)
        peak = peak_flops(torch.cuda.get_device_name()) if parts.engine.device.type == "cuda" else None
        self._peak = peak * parts.engine.processes if peak else None
        log = parts.plan.config.log
        self._trackers = Trackers(
            chosen_trackers(log) if self._active else [],
            output=output,
            project=log.project,
            resumed=resumed,
            settings=flat_config(parts.plan.config.model_dump(mode="json")),
            tell=display.say,
        )

    def rewind(self, step: int) -> None:
        """Forget what was written after the checkpoint of `step`."""
        if self._active:
            self._file.rewind(step, finishing=step >= self._parts.plan.horizon.steps)

    def step(self, step: int, result: StepResult, seconds: float) -> None:
        """Record a step; between log steps only time is added up."""
        self._pending_seconds += seconds
        self._pending_steps += 1
        plan = self._parts.plan
        if step % self._every and step != plan.horizon.steps and result.taken:
            return
        rate = self._pending_steps * plan.horizon.batch_tokens / max(self._pending_seconds, 1e-9)
        now = time.perf_counter()
        overall = self._pending_steps * plan.horizon.batch_tokens / max(now - self._last, 1e-9)
        self._pending_seconds, self._pending_steps, self._last = 0.0, 0, now
        values: dict[str, float] = {
            "tokens": step * plan.horizon.batch_tokens,
            "loss": result.loss,
            **({name: value for name, value in result.parts.items() if value} if self._parts.distils else {}),
            "lr": result.rate,
            "grad_norm": result.norm,
            "tokens_per_second": rate,
            "tokens_per_second_overall": overall,
        }
        if self._peak:
            values["mfu"] = rate * self._flops / self._peak
        values["peak_memory_bytes"] = peak_memory(self._parts.engine.device)
        if not result.taken:
            values["skipped"] = 1
            self._display.say(f"step {step:,}: skipped as a spike (loss {result.loss:.3g}, norm {result.norm:.3g})")
        self._write("train", step, values)
        left = (plan.horizon.steps - step) * plan.horizon.batch_tokens
        self._display.step(step, {**values, "tokens_left": left})

    def evaluation(
        self, step: int, losses: dict[str, float], reference: dict[str, float], *, weights: str | None = None
    ) -> None:
        """Record a held-out loss, and those of single sets.

        Args:
            step: after which it was measured.
            losses: see `gqa_convert.uptrain.evaluation.evaluate`; with an average of the weights also `loss_trained`
                and `loss_averaged`.
            reference: the original's, as `reference` and `reference/NAME`.
            weights: whose losses these are, `trained` or `averaged`; None where there is no average.
        """
        values = {f"held_out_{name}": value for name, value in losses.items()}
        values |= {name.replace("reference", "reference_loss", 1): loss for name, loss in reference.items()}
        self._write("evaluation", step, values, {} if weights is None else {"weights": weights})
        other = "trained" if weights == "averaged" else "averaged"
        whose = "" if weights is None else f" of the {weights} weights ({other}: {losses[f'loss_{other}']:.4f})"
        self._display.say(f"step {step:,}: held-out loss{whose} {_beside(losses['loss'], reference.get('reference'))}")
        for name, loss in losses.items():
            if name.startswith("loss/"):
                one = name.removeprefix("loss/")
                self._display.say(f"  {one}: {_beside(loss, reference.get(f'reference/{one}'))}")

    def tasks(self, step: int, scores: dict[str, float]) -> None:
        """Record scores of tasks, by `TASK/METRIC`."""
        self._write("tasks", step, scores)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if "stderr" not in name)
        self._display.say(f"step {step:,}: {shown}")

    def event(self, step: int, what: str, **values: Any) -> None:
        """Record that something happened."""
        if self._active:
            self._file.write("event", step, {"event": what, **values})

    def _write(self, kind: str, step: int, values: dict[str, float], words: dict[str, str] | None = None) -> None:
        if not self._active:
            return
        self._file.write(kind, step, {**values, **(words or {})})
        prefix = {"train": "train", "tasks": "tasks"}.get(kind, "held_out")
        named = {f"{prefix}/{name.removeprefix('held_out_')}": value for name, value in values.items()}
        self._trackers.log(named, step)

    @contextmanager
    def profiler(self) -> Iterator[Callable[[], None]]:
        """Trace a few early steps if asked to; the yielded function is called after every step."""
        if not self._parts.plan.config.log.profile:
            yield lambda: None
            return
        first, last = _PROFILED
        folder = self._output / "profile"
        rank = self._parts.engine.rank

        def write(profile: Any) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(folder / f"trace-{rank}.json"))
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profile.key_averages().table(sort_by=key, row_limit=30)
            (folder / f"operators-{rank}.txt").write_text(table, encoding="utf-8")

        schedule = torch.profiler.schedule(wait=first - 2, warmup=1, active=last - first + 1, repeat=1)
        with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
            yield profile.step

    def close(self) -> None:
        """Flush the trackers."""
        self._trackers.close()


def _beside(loss: float, reference: float | None) -> str:
    return f"{loss:.4f}" if reference is None else f"{loss:.4f} (the original's: {reference:.4f})"


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of tensors on a GPU, of everything on a processor."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
