"""The converted model beside its source, layer by layer: all that the conversion leaves alone is shared with it.

Only what depends on KV heads takes memory of its own, and that for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.weights import empty_model, move_buffers, set_parameter

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gqa_convert.calibrate.stream import Parts


class StudentParts:
    """A model of the target configuration whose layers are filled from the source's, as far as shapes agree.

    `load` must come after the source's `load` of the same layer; `put` then gives the layer its own tensors.

    Attributes:
        model: the target model; layers that are not loaded are on meta.
        layers: the source's layer paths.
    """

    def __init__(self, teacher: Parts, cls: type[nn.Module], config: Any, dtype: torch.dtype) -> None:
        self.teacher = teacher
        self.layers = teacher.layers
        self.model: Any = empty_model(cls, config, dtype)
        self._meta: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._share([name for name in self._meta if not self._in_layer(name)])

    def load(self, path: str, device: torch.device | str = "cpu") -> nn.Module:
        """Share the source's tensors of one layer; what differs in shape stays on meta until `put`."""
        self._share([name for name in self._meta if name.startswith(f"{path}.")])
        module: nn.Module = self.model.get_submodule(path)
        move_buffers(module, device)
        return module

    def release(self, path: str) -> None:
        """Let go of a layer's tensors."""
        for name, empty in self._meta.items():
            if name.startswith(f"{path}."):
                set_parameter(self.model, name, empty)
        move_buffers(self.model.get_submodule(path), "cpu")

    def put(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Give the model tensors by parameter name, cast to its dtype."""
        for name, tensor in state.items():
            set_parameter(self.model, name, tensor.to(device=device, dtype=self._meta[name].dtype))

    def _in_layer(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self.layers)

    def _share(self, names: list[str]) -> None:
        source = dict(self.teacher.model.state_dict(keep_vars=True))
        for name in names:
            tensor = source.get(name)
            if tensor is not None and tensor.device.type != "meta" and tensor.shape == self._meta[name].shape:
                set_parameter(self.model, name, tensor)
