"""Checkpoints that one process writes whole: parameters as safetensors, the optimiser's state beside them.

They are read into whole parameters, or into the shards of any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.errors import CheckpointError

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.pt"
AVERAGE = "average.safetensors"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's own name, without what engines and compilers put before and between."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


@dataclass(frozen=True)
class WholeState:
    """What is written: trained parameters by plain names, an optimiser's state dictionary, perhaps an average."""

    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any, average: Mapping[str, Tensor] | None = None) -> WholeState:
        """The state as it is now; tensors are the model's own."""
        parameters = {name: p.detach().contiguous() for name, p in trained_parameters(model).items()}
        kept = None if average is None else {name: value.contiguous() for name, value in average.items()}
        return cls(parameters, optimizer.state_dict(), kept)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by their plain names."""
    return {plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}


def save_whole(folder: Path, model: nn.Module, optimizer: Any, average: Mapping[str, Tensor] | None = None) -> None:
    """Write trained parameters, optimiser state, and the average of the weights if there is one.

    Raises:
        OSError: if writing fails.
    """
    write_whole(folder, WholeState.of(model, optimizer, average))


def write_whole(folder: Path, state: WholeState) -> None:
    """Write a state. See `save_whole`."""
    from safetensors.torch import save_file

    save_file(state.parameters, folder / MODEL)
    torch.save(state.optimizer, folder / OPTIMIZER)
    if state.average is not None:
        save_file(state.average, folder / AVERAGE)


def load_whole_average(folder: Path, values: Mapping[str, Tensor]) -> None:
    """Read an average of weights into tensors that are there, sharded or whole; others than are saved stay as they are.

    Raises:
        CheckpointError: if it is of other parameters, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / AVERAGE, "pt") as saved, torch.no_grad():
            for name in saved.keys():  # noqa: SIM118 - no dictionary
                value = saved.get_tensor(name)
                if name not in values or values[name].shape != value.shape:
                    raise CheckpointError(f"{folder / AVERAGE}: {name} is no parameter of this model.")
                values[name].copy_(_like(value, values[name]))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / AVERAGE}: cannot be read ({error}).") from error


def load_whole(folder: Path, model: nn.Module, optimizer: Any | None) -> None:
    """Read what `save_whole` wrote.

    Args:
        folder: the training checkpoint.
        model: with the same parameters to train, sharded or whole.
        optimizer: of its parameters; None to read weights alone, of whichever parameters are there.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimiser, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    named = {plain_name(name): value for name, value in model.named_parameters()}
    trained = set(trained_parameters(model))
    try:
        with safe_open(folder / MODEL, "pt") as saved, torch.no_grad():
            keys = {plain_name(key): key for key in saved.keys()}  # noqa: SIM118 - no dictionary
            odd = sorted(keys.keys() - named.keys() if optimizer is None else keys.keys() ^ trained)
            if odd:
                raise CheckpointError(f"{folder}: holds other parameters than are trained now, for one {odd[0]}.")
            for name, key in keys.items():
                parameter, value = named[name], saved.get_tensor(key)
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{folder}: {name} has shape {list(value.shape)} there, the model's {list(parameter.shape)}."
                    )
                parameter.copy_(_like(value, parameter))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / MODEL}: cannot be read ({error}).") from error
    if optimizer is not None:
        _load_optimizer(folder, optimizer)


def _load_optimizer(folder: Path, optimizer: Any) -> None:
    state = read_optimizer(folder / OPTIMIZER)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number] if isinstance(number, int) and 0 <= number < len(parameters) else None
        if parameter is None or not isinstance(values, dict):
            raise CheckpointError(f"{folder / OPTIMIZER}: holds the state of another optimiser.")
        for key, value in values.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if key in _SHAPED and value.ndim == parameter.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder / OPTIMIZER}: {key} of parameter {number} has shape {list(value.shape)}, not "
                    f"{list(parameter.shape)}."
                )
            if hasattr(parameter, "placements"):
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{folder}: the state of this optimiser ({key}) cannot be spread over processes. Resume with "
                        "one device or DDP."
                    )
                values[key] = _like(value, parameter)
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        words = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{folder / OPTIMIZER}: does not fit this run's optimiser ({words}).") from error


_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""State of the parameter's own shape, where it has as many axes."""


def _like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor as a parameter is: on its device, or this process's shard of it."""
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Each process has read the same tensor and keeps its part: nothing is sent.
    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def read_optimizer(path: Path) -> dict[str, Any]:
    """Read an optimiser's state dictionary; the file is mapped, so tensors cost nothing until they are looked at.

    Raises:
        CheckpointError: if it cannot be read, or holds anything but tensors and plain values in the form expected.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive raises whatever its parts come to
        words = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: cannot be read without running code, or is damaged ({words}).") from error
    groups = state.get("param_groups") if isinstance(state, dict) else None
    whole = isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    if not whole or not isinstance(state.get("state"), dict):
        raise CheckpointError(f"{path}: holds no optimiser's state.")
    return dict(state)
