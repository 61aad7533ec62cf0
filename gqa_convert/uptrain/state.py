"""What a checkpoint holds of model and optimiser, and how it is written and read: whole, or a shard a process.

Only parameters that are trained are saved: the frozen ones are those of the model folder. Random numbers need no
state: every step seeds them from (seed, step, process).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.checkpoint.safetensors_file import read_header
from gqa_convert.errors import CheckpointError
from gqa_convert.uptrain.shards import FOLDER as SHARDS
from gqa_convert.uptrain.shards import (
    has_sharded_average,
    load_sharded_average,
    load_shards,
    read_description,
    save_shards,
    sharded_state,
    write_shards,
)
from gqa_convert.uptrain.whole import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    WholeState,
    load_whole,
    load_whole_average,
    read_optimizer,
    save_whole,
    write_whole,
)
from gqa_convert.uptrain.zero import FOLDER as ZERO
from gqa_convert.uptrain.zero import gather_zero, is_zero, load_zero, save_zero


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (DTensors, as FSDP2 leaves them)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def save_training_state(
    folder: Path, model: nn.Module, optimizer: Any, *, is_main: bool, average: Mapping[str, Tensor] | None = None
) -> None:
    """Write trained parameters and optimiser state. Called by every process; each writes what is its own.

    Args:
        folder: the training checkpoint.
        model: as the engine has it.
        optimizer: prepared.
        is_main: whether this process writes what all have alike.
        average: of the trained parameters, by plain names; not under DeepSpeed.

    Raises:
        OSError: if writing fails.
    """
    if is_zero(model):
        save_zero(folder, model)
    elif is_sharded(model):
        save_shards(folder, model, _plain(optimizer), average)
    elif is_main:
        save_whole(folder, model, _plain(optimizer), average)


def copied_state(
    model: nn.Module,
    optimizer: Any,
    *,
    is_main: bool,
    average: Mapping[str, Tensor] | None = None,
    group: Any | None = None,
) -> Callable[[Path], None]:
    """Copy what `save_training_state` writes into the host's memory; what is returned writes it, in any thread.

    Args:
        model: as the engine has it; not DeepSpeed's.
        optimizer: prepared.
        is_main: whether this process writes what all have alike.
        average: as for `save_training_state`.
        group: of processes, for shards: that of the training is busy meanwhile.
    """
    if is_sharded(model):
        parts = _on_host(sharded_state(model, _plain(optimizer), average))
        return lambda folder: write_shards(folder, parts, group=group)
    if not is_main:
        return lambda _: None
    now = WholeState.of(model, _plain(optimizer), average)
    copy = WholeState(_on_host(now.parameters), _on_host(now.optimizer), _on_host(now.average))
    return lambda folder: write_whole(folder, copy)


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(inner) for key, inner in value.items()}
    return type(value)(_on_host(inner) for inner in value) if isinstance(value, (list, tuple)) else value


def has_average(folder: Path) -> bool:
    """Whether a training checkpoint holds an average of the weights.

    Raises:
        CheckpointError: if the description of its shards is damaged.
    """
    return (folder / AVERAGE).is_file() or ((folder / SHARDS).is_dir() and has_sharded_average(folder))


def load_average(folder: Path, values: Mapping[str, Tensor]) -> None:
    """Read a checkpoint's average into tensors that are there, by plain names, whichever engine wrote it.

    Raises:
        CheckpointError: if it is damaged, or of other parameters.
    """
    if (folder / AVERAGE).is_file():
        load_whole_average(folder, values)
    else:
        load_sharded_average(folder, values, together=any(hasattr(value, "placements") for value in values.values()))


def load_training_state(folder: Path, model: nn.Module, optimizer: Any | None) -> None:
    """Read what `save_training_state` wrote, into a model and an optimiser of the same make. Called by every process.

    One device, DDP and FSDP2 read each other's checkpoints, whatever the number of processes; DeepSpeed reads its own.

    Args:
        folder: the training checkpoint.
        model: as the engine has it.
        optimizer: prepared; None to leave the optimiser's state alone.

    Raises:
        CheckpointError: if the checkpoint is damaged, of another model, or DeepSpeed's and the engine is not.
    """
    saved_by_zero = (folder / ZERO).is_dir()
    if saved_by_zero != is_zero(model):
        whose = "DeepSpeed's" if saved_by_zero else "no DeepSpeed"
        raise CheckpointError(f"{folder}: holds {whose} weights; resume with the engine it was saved by.")
    plain = None if optimizer is None else _plain(optimizer)
    if is_zero(model):
        load_zero(folder, model)
    elif (folder / SHARDS).is_dir():
        load_shards(folder, model, plain, together=is_sharded(model))
    else:
        load_whole(folder, model, plain)


def training_state_problem(folder: Path) -> str | None:
    """Say what keeps a checkpoint's weights and optimiser state from being read; None if nothing does.

    Reads what describes them, no tensors.
    """
    try:
        if (folder / SHARDS).is_dir():
            read_description(folder / SHARDS)
        elif not (folder / ZERO).is_dir():
            missing = [name for name in (MODEL, OPTIMIZER) if not (folder / name).is_file()]
            if missing:
                return f"{missing[0]} is missing"
            read_header(folder / MODEL)
            read_optimizer(folder / OPTIMIZER)
            if (folder / AVERAGE).is_file():
                read_header(folder / AVERAGE)
    except CheckpointError as error:
        return str(error).rstrip(".")
    return None


def _plain(optimizer: Any) -> Any:
    """The optimiser under accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU; empty on other processes than the main one if it was sharded."""
    if is_zero(model):
        return gather_zero(model)
    if not is_sharded(model):
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(whole)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for a step of a process: what is drawn depends on nothing else, so resuming needs no state."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) & 0x7FFF_FFFF_FFFF_FFFF)


def clip_gradients(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scale gradients to a norm of `limit` at most; returns the norm before, the same on every process."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Of sharded gradients each process knows its part; the whole norm must be known before anything is scaled by it.
    full = getattr(norm, "full_tensor", None)
    if full is not None:
        norm = full()
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
