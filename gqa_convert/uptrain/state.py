"""What a checkpoint holds of model and optimiser, and how it is written and read: whole, or a shard a process.

Only parameters that are trained are saved: the frozen ones are those of the model folder. Random numbers need no
state: every step seeds them from (seed, step, process).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.errors import CheckpointError
from gqa_convert.uptrain.zero import FOLDER, gather_zero, is_zero, load_zero, save_zero

_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.pt"
_SHARDS = "shards"


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (DTensors, as FSDP2 leaves them)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def save_training_state(folder: Path, model: nn.Module, optimizer: Any, *, is_main: bool) -> None:
    """Write trained parameters and optimiser state. Called by every process; each writes what is its own.

    Raises:
        OSError: if writing fails.
    """
    if is_zero(model):
        save_zero(folder, model)
        return
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        found: dict[str, Any] = {"model": get_model_state_dict(model)}
        if _plain(optimizer).state:
            # Before the first step there is nothing to save, and asking would make torch take an empty step, which
            # Adam counts: every update after it would differ.
            found["optimizer"] = get_optimizer_state_dict(model, _plain(optimizer))
        save(found, checkpoint_id=folder / _SHARDS)
        return
    if not is_main:
        return
    from safetensors.torch import save_file

    save_file({name: p.detach().contiguous() for name, p in _trained(model)}, folder / _MODEL)
    torch.save(_plain(optimizer).state_dict(), folder / _OPTIMIZER)


def load_training_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Read what `save_training_state` wrote, into a model and an optimiser of the same make.

    Raises:
        CheckpointError: if the checkpoint is of another model or another way of sharding.
    """
    made, wanted = _kind_of(folder), "DeepSpeed's" if is_zero(model) else "sharded" if is_sharded(model) else "whole"
    if made != wanted:
        raise CheckpointError(f"{folder}: holds {made} weights; resume with the engine it was saved by.")
    if is_zero(model):
        load_zero(folder, model)
        return
    if made == "sharded":
        _load_shards(folder / _SHARDS, model, _plain(optimizer))
        return
    from safetensors.torch import load_file

    saved = load_file(folder / _MODEL)
    trained = dict(_trained(model))
    if saved.keys() != trained.keys():
        odd = sorted(saved.keys() ^ trained.keys())
        raise CheckpointError(f"{folder}: holds other parameters than are trained now, for one {odd[0]}.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    _plain(optimizer).load_state_dict(state)


def _kind_of(folder: Path) -> str:
    if (folder / FOLDER).is_dir():
        return "DeepSpeed's"
    return "sharded" if (folder / _SHARDS).is_dir() else "whole"


def _load_shards(folder: Path, model: nn.Module, optimizer: Any) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load

    found: dict[str, Any] = {"model": get_model_state_dict(model)}
    keys = FileSystemReader(folder).read_metadata().state_dict_metadata
    with_optimizer = any(key.startswith("optimizer.") for key in keys)
    if with_optimizer:
        found["optimizer"] = get_optimizer_state_dict(model, optimizer)
    load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"])
    if with_optimizer:
        set_optimizer_state_dict(model, optimizer, found["optimizer"])


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


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


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
