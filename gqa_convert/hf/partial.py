"""A model of which only the parts in use are in memory: built on meta, filled from a checkpoint a module at a time.

Filling goes through transformers' own loading (renamed keys, per-expert tensors that are stacked, fused ones that are
cut), so that a part holds what `from_pretrained` would have put there. This is the one file of the room that calls
transformers' internals; whoever uses it must be ready to fall back to a whole model when they have moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gqa_convert.errors import CheckpointError
from gqa_convert.hf import api

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gqa_convert.checkpoint.reader import Checkpoint


def layer_paths(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the model's layers: the entries of its outermost module lists, in the model's order."""
    return tuple(_layers(model, ""))


def _layers(module: nn.Module, prefix: str) -> Iterator[str]:
    from torch import nn

    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield path
        else:
            yield from _layers(child, f"{path}.")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default while a model is built, as `from_pretrained` does."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def empty_model(cls: type[nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model on meta whose computed buffers (rotary frequencies, masks) are real, on the CPU.

    Parameters and stored buffers stay on meta. The model is in evaluation mode and asks for no gradients.
    """
    with default_dtype(dtype):
        model = api.build_on_meta(cls, config).eval().requires_grad_(False)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        _compute(model, [name for name, _ in model.named_non_persistent_buffers()])  # type: ignore[operator]
    return model


def _compute(model: Any, names: Iterable[str]) -> None:
    """Give the named tensors memory and let the model's own initialisation fill them, and nothing else."""
    import torch
    from torch import nn

    for name in names:
        owner_path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        old = getattr(owner, leaf)
        empty = torch.empty_like(old, device="cpu")
        setattr(owner, leaf, nn.Parameter(empty, requires_grad=False) if isinstance(old, nn.Parameter) else empty)
        owner._is_hf_initialized = False
    model.initialize_weights()


class PartialModel:
    """A model on meta and the checkpoint that its parts are filled from.

    Attributes:
        model: everything outside `layers` is filled, on the CPU.
        layers: paths of the layers; see `layer_paths`. `load` and `release` take them one at a time.
        layer_bytes: bytes of the largest layer.
        outer_bytes: bytes of everything outside the layers.

    Raises:
        CheckpointError: if the checkpoint lacks a tensor that the model needs outside its layers.
    """

    def __init__(self, checkpoint: Checkpoint, cls: type[nn.Module], config: Any, *, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.model: Any = empty_model(cls, config, dtype)
        self.layers = layer_paths(self.model)
        self._meta: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._keys = self._raw_keys()
        self._fill([""])
        self.layer_bytes = max((self._bytes(path) for path in self.layers), default=0)
        self.outer_bytes = self._bytes("")

    def load(self, path: str, device: torch.device | str = "cpu") -> nn.Module:
        """Fill one layer and return it, on `device`."""
        self._fill([path])
        module: nn.Module = self.model.get_submodule(path)
        return module.to(device)

    def release(self, path: str) -> None:
        """Give a layer's memory back."""
        for name in self._names(path):
            set_parameter(self.model, name, self._meta[name])
        move_buffers(self.model.get_submodule(path), "cpu")

    def _raw_keys(self) -> dict[str, list[str]]:
        """Raw checkpoint keys by the layer they fill; `""` for those outside the layers."""
        key_map = api.KeyMap(self.model)
        keys: dict[str, list[str]] = {"": [], **{path: [] for path in self.layers}}
        for raw in self.checkpoint.tensors:
            for part in dict.fromkeys(self._layer_of(name) for name in key_map.targets(raw)):
                keys[part].append(raw)
        return keys

    def _layer_of(self, name: str) -> str:
        return next((path for path in self.layers if name.startswith(f"{path}.")), "")

    def _names(self, part: str) -> list[str]:
        return [name for name in self._meta if self._layer_of(name) == part]

    def _bytes(self, part: str) -> int:
        return sum(self._meta[name].numel() * self._meta[name].element_size() for name in self._names(part))

    def _fill(self, parts: list[str]) -> None:
        names = [name for part in parts for name in self._names(part)]
        raw = {key: self.checkpoint.tensor(key) for part in parts for key in self._keys[part]}
        load_raw(self.model, raw, self.dtype)
        tied = self.model.all_tied_weights_keys
        if any(self._layer_of(name) in parts for pair in tied.items() for name in pair):
            with api.quiet():
                self.model.tie_weights(missing_keys=self._missing(self._meta), recompute_mapping=False)
        missing = self._missing(names)
        if missing:
            self._fill_missing(missing)

    def _missing(self, names: Iterable[str]) -> set[str]:
        state = self.model.state_dict(keep_vars=True)
        return {name for name in names if state[name].device.type == "meta"}

    def _fill_missing(self, missing: set[str]) -> None:
        """Compute what the checkpoint may leave out (buffers, fixed tables), as loading does; else it is an error."""
        from torch import nn

        weights = sorted(name for name in missing if isinstance(self._meta[name], nn.Parameter))
        weights = [name for name in weights if not self._made_by_code(name)]
        if weights:
            raise CheckpointError(f"{self.checkpoint.folder}: lacks {weights[0]}, which its configuration calls for.")
        _compute(self.model, missing)

    def _made_by_code(self, name: str) -> bool:
        """True for a weight that saving leaves out: the model's own initialisation gives it back."""
        patterns = [*(self.model._keys_to_ignore_on_save or ()), *(self.model._keys_to_ignore_on_load_missing or ())]
        return any(re.search(pattern, name) for pattern in patterns)


def whole_model(checkpoint: Checkpoint, cls: type[nn.Module], config: Any, *, dtype: torch.dtype) -> Any:
    """Return a model with all its parts filled; unlike `from_pretrained`, this also reads views of checkpoints.

    Raises:
        CheckpointError: if the checkpoint lacks a tensor that the model needs.
    """
    parts = PartialModel(checkpoint, cls, config, dtype=dtype)
    for path in parts.layers:
        parts.load(path)
    return parts.model


def set_parameter(model: Any, name: str, value: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer `name`, sharing its memory."""
    from torch import nn

    owner_path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_path)
    if leaf in owner._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


def move_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Move a module's computed buffers; those on meta stay there."""
    for owner in module.modules():
        for leaf, buffer in owner.named_buffers(recurse=False):
            if buffer.device.type != "meta":
                setattr(owner, leaf, buffer.to(device))


def load_raw(model: Any, raw: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put raw checkpoint tensors where loading would put them, in the dtype that the model was built with.

    Raises:
        CheckpointError: if transformers could not convert one of them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: list[Any] = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping)
    with api.quiet():
        info, _ = convert_and_load_state_dict_in_model(model, raw, how, None)
    if info.conversion_errors:
        key, text = next(iter(info.conversion_errors.items()))
        raise CheckpointError(f"{key}: transformers {api.version()} could not load it: {text[-300:]}")
    if info.mismatched_keys:
        name, seen, expected = sorted(info.mismatched_keys)[0]
        raise CheckpointError(f"{name}: has shape {tuple(seen)}, but config.json calls for {tuple(expected)}.")
