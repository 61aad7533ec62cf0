"""Gradients of one step under FSDP2 as accelerate sets it on GPUs, by as many processes as the launcher started.

`OUT CONFIG`: for each precision, way of summing and number of accumulations writes the whole gradient, the losses and
the number of reductions. Every process works through its share of the same micro-batches.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gqa_convert.hf.loading import Source, load_model
from gqa_convert.uptrain import optim
from gqa_convert.uptrain.config import OptimizerSection, UptrainConfig
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.model import ScoredModel
from gqa_convert.uptrain.objective import LossSpec
from gqa_convert.uptrain.read_config import load_config
from tests.uptrain.sharded_worker import ShardedEngine

MOST = 64
CASES = [(precision, sync) for precision in ("float32", "bf16") for sync in ("micro_batch", "step")]


class Reductions(TorchDispatchMode):
    """Counts how often gradients are summed over processes."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def micro_batches(count: int, processes: int, rank: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for number in range(count * 2):  # as many for any number of processes
        ids = torch.randint(3, 20, (1, 24), generator=generator)
        if number % processes == rank:
            yield {"input_ids": ids}, ids.roll(-1, 1)


def gradient(engine: Engine, config: UptrainConfig, accumulations: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = load_model(Source.open(Path(config.model)), dtype=torch.float32)
    scored = ScoredModel(model, LossSpec()).train()
    prepared, optimizer = engine.prepare(scored, optim.make_optimizer(scored, OptimizerSection()))
    batches = list(micro_batches(accumulations, engine.processes, engine.rank))
    losses = torch.zeros(2)
    with Reductions() as sent:  # type: ignore[no-untyped-call]
        for number, (inputs, labels) in enumerate(batches):
            last = number == len(batches) - 1
            with engine.accumulating(prepared, last=last):
                with engine.autocast():
                    loss, terms = prepared(inputs, labels)
                assert loss.dtype == terms.dtype == torch.float32
                engine.backward(prepared, loss * engine.processes, last=last)
            losses += torch.stack([loss.detach(), terms[0]])
    engine.sum(losses)
    whole = {}
    for name, parameter in prepared.named_parameters():
        grad = parameter.grad
        whole[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    optimizer.zero_grad()
    return {"gradient": whole, "losses": losses, "reductions": sent.count}


def main(out: str, path: str) -> None:
    gradients = {}
    for precision, sync in CASES:
        config = load_config(Path(path), [f"train.precision={precision}", f"train.fsdp_sync={sync}"])
        for accumulations in (1, 8, MOST):
            engine = (ShardedEngine if torch.distributed.is_torchelastic_launched() else Engine)(config)
            gradients[precision, sync, accumulations] = gradient(engine, config, accumulations)
            rank = engine.rank
            engine.accelerator.free_memory()
            if not torch.distributed.is_initialized():
                engine.close()
            else:
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state()
    if rank == 0:
        torch.save(gradients, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
