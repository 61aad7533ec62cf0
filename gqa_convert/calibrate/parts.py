"""Choose how a source model is held while it is calibrated: layer by layer where that is proven exact, else whole."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.layer_stream import LayerStream, Parts
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source, load_model
from gqa_convert.hf.partial import PartialModel, empty_model, layer_paths, move_buffers, set_parameter

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gqa_convert.calibrate.layer_stream import Parts

TOLERANCE = 1e-5
"""Largest accepted difference of logits, as a share of the largest logit, between streamed and plain float32 passes."""


class WholeModel:
    """A model that is in memory as a whole, with the interface of `PartialModel`."""

    def __init__(self, source: Source, *, dtype: torch.dtype) -> None:
        self.model: Any = load_model(source, dtype=dtype).requires_grad_(False)
        self.layers = layer_paths(self.model)

    def load(self, path: str, device: torch.device | str = "cpu") -> nn.Module:
        """Return a layer, on `device`."""
        module: nn.Module = self.model.get_submodule(path)
        return module.to(device)

    def release(self, path: str) -> None:
        """Bring a layer back to the CPU."""
        module: nn.Module = self.model.get_submodule(path).to("cpu")
        move_buffers(module, "cpu")


def open_parts(source: Source, *, dtype: torch.dtype) -> tuple[Parts, tuple[str, ...]]:
    """Return the source model in the leanest form that is proven to work, and notes on the choice.

    Raises:
        CheckpointError: if the weights are not those that the configuration describes.
    """
    cls, config = source.model_class, source.config
    reason = streaming_fault(cls, config)
    if reason is None:
        return PartialModel(source.checkpoint, cls, config, dtype=dtype), ()
    note = f"{cls.__name__} is held whole in memory while it is calibrated: layer by layer, {reason}"
    return WholeModel(source, dtype=dtype), (note,)


def streaming_fault(cls: type[nn.Module], config: Any) -> str | None:
    """Return why a model cannot be run a layer at a time; None if a tiny random one of its architecture can.

    The tiny model is saved, streamed from its files, and must give the logits of a plain forward pass.
    """
    import torch

    from gqa_convert.tiny.forward import difference, logits
    from gqa_convert.tiny.model import heard_inputs, text_inputs, tiny_model
    from gqa_convert.tiny.shrink import shrink

    try:
        tiny = shrink(config)
        model = tiny_model(tiny, cls=cls)
        inputs = [heard_inputs(model, seed) or text_inputs(model, seed=seed) for seed in (0, 1)]
        with tempfile.TemporaryDirectory() as folder, api.quiet():
            model.save_pretrained(folder)
            written = Source(checkpoint=Checkpoint.open(Path(folder)), config=tiny, given_class=cls)
            whole = WholeModel(written, dtype=torch.float32).model
            lean = PartialModel(written.checkpoint, cls, tiny, dtype=torch.float32)
            stream = LayerStream(lean, inputs, keep_results=True)
            for _ in stream:
                pass
            gap = max(
                difference(seen.logits, logits(whole, each)) for seen, each in zip(stream.results, inputs, strict=True)
            )
    except Exception as error:  # whatever it is, the whole model still works
        text = re.sub(r"\S*/\S+: ", "", " ".join(str(error).split()))  # the temporary folder means nothing to anybody
        return f"a tiny model of it fails ({type(error).__name__}: {text[:160]})"
    return None if gap <= TOLERANCE else f"a tiny model of it is off by {gap:.1e}"


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
