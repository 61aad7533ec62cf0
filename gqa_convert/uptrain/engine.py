"""How processes work together: accelerate chooses, and the run makes sure that it got what was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from gqa_convert.data.batches import accumulation_steps
from gqa_convert.errors import GQAConvertError, UsageError
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain import zero
from gqa_convert.uptrain.config import ExpectSection, UptrainConfig
from gqa_convert.uptrain.sharded_loading import load_sharded, shard_rest
from gqa_convert.uptrain.state import clip_gradients

T = TypeVar("T")
_TIMEOUT = timedelta(hours=2)
"""One process may save, evaluate or tokenise for long while the others wait."""


class Engine:
    """The processes of a run, and what they do together.

    Attributes:
        name: `single`, `ddp`, `fsdp2` or `deepspeed`.
        processes: how many.
        rank: which one this is.
        device: where it computes.
    """

    def __init__(self, config: UptrainConfig) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        load_whole_models_everywhere()
        plugin = zero.zero_plugin(config)
        self._bf16 = config.train.precision == "bf16"
        self._sync = config.train.fsdp_sync
        # Of DeepSpeed accelerate would make bf16 weights; its autocast is asked for in the plugin.
        precision = "bf16" if self._bf16 and plugin is None else "no"
        # accelerate knows no backend for DeepSpeed without a GPU.
        backend = {"backend": "gloo"} if plugin is not None and not torch.cuda.is_available() else {}
        self.accelerator = Accelerator(
            mixed_precision=precision,
            cpu=config.train.device == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT, **backend)],
            deepspeed_plugins=plugin,
        )
        # Set for its own loops, by its configuration or launcher; it would divide every loss once more.
        self.accelerator.gradient_accumulation_steps = 1
        self.name = _engine_name(self.accelerator)
        if plugin is not None:
            if self.name != "deepspeed":
                raise UsageError(f"DeepSpeed was asked for, {self.name} is running. Is ACCELERATE_USE_CPU set?")
            zero.leave_loading_alone()
        self.processes: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        check_expected(config.expect, engine=self.name, processes=self.processes)
        # Before hours of tokenising, not after.
        accumulation_steps(config.train.batch_sequences, micro=config.train.micro_batch, processes=self.processes)
        if self.name == "fsdp2" and config.train.parameters == "lora":
            raise UsageError("train.parameters=lora: adapters are small; use DDP, not FSDP2, for them.")

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Hand model and optimiser to the engine."""
        if self.name == "fsdp2":
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = sharded_precision(self._bf16)
        prepared = self.accelerator.prepare(model, optimizer)
        if self.name == "deepspeed":
            zero.announce_head(model)
        return prepared[0], prepared[1]

    def load_sharded(self, source: Source, *, dtype: torch.dtype, attention: str) -> Any:
        """Load a model for FSDP2 with its layers sharded. See `gqa_convert.uptrain.sharded_loading.load_sharded`."""
        plugin = self.accelerator.state.fsdp_plugin
        return load_sharded(
            source,
            dtype=dtype,
            attention=attention,
            policy=sharded_precision(self._bf16),
            device=self.device,
            reshard=bool(plugin.reshard_after_forward),
        )

    def shard_rest(self, module: nn.Module) -> nn.Module:
        """Shard what `load_sharded` has left whole; the module is what is called from now on."""
        return shard_rest(module, policy=sharded_precision(self._bf16), device=self.device)

    def autocast(self) -> Any:
        """Arithmetic in the run's precision."""
        if self.name == "deepspeed":
            return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)
        return self.accelerator.autocast()

    def accumulating(self, model: nn.Module, *, last: bool) -> Any:
        """Around a forward and backward pass; DDP exchanges gradients in the last one of a step only.

        FSDP2 does so in each: gradients that wait are whole on every process, which is what sharding was to avoid.
        """
        if last or self.processes == 1 or self.name == "deepspeed":
            return nullcontext()
        if self.name != "fsdp2":
            return self.accelerator.no_sync(model)
        return nullcontext() if self._sync == "micro_batch" else unsummed(model)

    def backward(self, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; `last` says that the step's are then complete."""
        if self.name != "deepspeed":
            self.accelerator.backward(loss)
            return
        # accelerate's own would take the step at once, before it was judged.
        deepspeed: Any = model
        deepspeed.set_gradient_accumulation_boundary(is_boundary=last)
        deepspeed.backward(loss, scale_wrt_gas=False)

    def clip(self, parameters: list[nn.Parameter], limit: float | None) -> Tensor:
        """Scale gradients to a norm of `limit` at most; returns the norm before, the same on every process.

        DeepSpeed scales them by itself, to the same limit, when it takes the step.
        """
        if self.name == "deepspeed":
            return zero.gradient_norm(parameters, self.device)
        return clip_gradients(parameters, limit)

    def move(self, model: nn.Module, optimizer: Any, *, taken: bool) -> None:
        """Take the step, or drop it; gradients are gone afterwards."""
        if self.name == "deepspeed":
            deepspeed: Any = model
            # Also makes the next backward pass start anew instead of adding.
            deepspeed.step() if taken else deepspeed.optimizer.zero_grad()
            return
        if taken:
            optimizer.step()
        optimizer.zero_grad()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if self.processes > 1:
            torch.distributed.all_reduce(values)
        return values

    def sum_of(self, value: float) -> float:
        """Sum a number over processes."""
        if self.processes == 1:
            return value
        return float(self.sum(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def close(self) -> None:
        """Let go of the process group and of accelerate's global state, so that another run can start here."""
        from accelerate.state import AcceleratorState

        if self.processes > 1:
            self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)

    def from_main(self, find: Callable[[], T]) -> T:
        """Let the main process find something out and tell the others; what goes wrong there is raised on all.

        Processes that each look for themselves may see different things, and would then go different ways.
        """
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = find()
            except GQAConvertError as error:
                answer[1] = error
        if self.processes > 1:
            torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def gather(self, value: T) -> list[T]:
        """What each process has, on every process."""
        values: list[Any] = [value]
        if self.processes > 1:
            values = [None] * self.processes
            torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait for every process."""
        self.accelerator.wait_for_everyone()

    def main_first(self, work: Callable[[bool], T]) -> T:
        """Do something on one process of every machine, then on the others, which find what it has written.

        What goes wrong on any of them is raised on all: none is left waiting.

        Args:
            work: told whether its process is the first of its machine.
        """
        first = bool(self.accelerator.is_local_main_process)
        result: T | None = None
        for turn in (True, False):
            problem: GQAConvertError | None = None
            if first == turn:
                try:
                    result = work(first)
                except GQAConvertError as error:
                    problem = error
            self._raise_together(problem)
        return cast(T, result)

    def _raise_together(self, problem: GQAConvertError | None) -> None:
        for failure in self.gather(problem):
            if failure is not None:
                raise failure


@contextmanager
def unsummed(model: Any) -> Iterator[None]:
    """Keep FSDP2 from summing gradients over processes; they add up, whole and in float32, on each."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def sharded_precision(bf16: bool) -> Any:
    """What FSDP2 computes in: weights in bf16 if asked for, gradients summed over processes in float32.

    Outputs stay as they are: accelerate's own policy makes them bf16, the loss and the sums of the evaluation too.

    Returns:
        torch's `MixedPrecisionPolicy`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)


def load_whole_models_everywhere() -> None:
    """Switch off what accelerate's launcher switches on for FSDP: weights on one process of a machine only.

    The others would hold empty models, and what they are asked before training (does the model keep documents apart?
    what does the teacher say?) would be answered from nothing.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _engine_name(accelerator: Any) -> str:
    kind = accelerator.distributed_type.name
    if kind == "NO":
        return "single"
    if kind == "FSDP":
        if not getattr(accelerator, "is_fsdp2", False):
            raise UsageError("FSDP version 1 is not supported. Set fsdp_version: 2 in the accelerate config.")
        return "fsdp2"
    if kind == "DEEPSPEED":
        return "deepspeed"
    if kind.startswith("MULTI_"):
        return "ddp"
    raise UsageError(f"accelerate chose {kind}, which is not supported. Use one device, DDP, FSDP2 or DeepSpeed.")


def check_expected(expect: ExpectSection, *, engine: str, processes: int) -> None:
    """Refuse to run as anything else than was asked for.

    Raises:
        UsageError: naming both. accelerate falls back silently where a launcher, backend or plugin is missing.
    """
    differences = []
    if expect.engine is not None and expect.engine != engine:
        differences.append(f"engine {expect.engine} was asked for, {engine} is running")
    if expect.processes is not None and expect.processes != processes:
        differences.append(f"{expect.processes} processes were asked for, {processes} are running")
    if differences:
        raise UsageError(
            f"expect: {'; '.join(differences)}. accelerate falls back without a word where a backend is missing (on "
            "CPU, start processes with torchrun and have no FSDP). Fix the launch command, or drop `expect`."
        )
