"""The final weights of a sharded model, gathered and written a tensor at a time: no process ever holds all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.checkpoint.dtypes import FLOATS, torch_dtype
from gqa_convert.checkpoint.resolve import SAFE_INDEX
from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard
from gqa_convert.hf.api import KeyMap
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain.whole import plain_name


class StreamedWeights:
    """A sharded model's weights under the keys, in the files, the order and the dtypes of the source.

    Every process makes one. The main one calls `write`, the others `follow`; the main one calls `follow` too, at the
    end, so that nobody waits for it if writing fails.

    Args:
        model: as the engine has it, the transformers model under `model.`.
        source: the checkpoint that training started from.
    """

    def __init__(self, model: nn.Module, source: Source) -> None:
        self._source = source
        self._parameters: dict[str, Any] = {
            plain_name(name).removeprefix("model."): value
            for name, value in model.named_parameters(remove_duplicate=False)
        }
        self._names = self._mapped()
        self._done = 0

    @property
    def fits(self) -> bool:
        """Whether each tensor of the source is one parameter, as it is; else the model must be saved whole."""
        return self._names is not None

    def _mapped(self) -> dict[str, str | None] | None:
        """By the source's keys, in the order of its files, the parameter that each is; None for one of no parameter."""
        checkpoint = self._source.checkpoint
        key_map = KeyMap(self._source.meta_model)
        if not all(shard.name.endswith(".safetensors") for shard in checkpoint.shards):
            return None
        mapped: dict[str, str | None] = {}
        for shard in checkpoint.shards:
            for key, info in shard.tensors.items():
                targets = key_map.targets(key)
                if not targets or targets[0] not in self._parameters:
                    mapped[key] = None  # a buffer, or what no code reads any more: as it was
                    continue
                same = tuple(self._parameters[targets[0]].shape) == tuple(info.shape)
                if len(targets) != 1 or key_map.operations(key) or not same or info.dtype not in FLOATS:
                    return None
                mapped[key] = targets[0]
        written = {id(self._parameters[name]) for name in mapped.values() if name is not None}
        return mapped if all(id(value) in written for value in self._parameters.values()) else None

    def write(self, stage: Path) -> None:
        """Write the weight files into a folder. Called by the main process, once.

        Raises:
            OSError: if writing fails.
        """
        assert self._names is not None
        checkpoint = self._source.checkpoint
        weight_map: dict[str, str] = {}
        total = 0
        for shard in checkpoint.shards:
            tensors = []
            for key, info in shard.tensors.items():
                name = self._names[key]
                if name is None:
                    tensors.append(TargetTensor.copy_of(info))
                    continue
                produce = partial(self._whole, name, torch_dtype(info.dtype))
                tensors.append(TargetTensor(key=key, dtype=info.dtype, shape=info.shape, produce=produce))
            write_shard(stage / shard.name, tensors, dict(shard.metadata))
            weight_map |= {tensor.key: shard.name for tensor in tensors}
            total += sum(tensor.nbytes for tensor in tensors)
        if checkpoint.is_sharded:
            elements = sum(value.numel() for value in {id(v): v for v in self._parameters.values()}.values())
            write_index(stage / SAFE_INDEX, weight_map, total, elements)

    def follow(self) -> None:
        """Take part in gathering what the main process has still to gather."""
        assert self._names is not None
        for name in [name for name in self._names.values() if name is not None][self._done :]:
            self._whole(name, None)

    @torch.no_grad()
    def _whole(self, name: str, dtype: torch.dtype | None) -> Tensor:
        self._done += 1
        parameter = self._parameters[name]
        full: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return full if dtype is None else full.detach().to("cpu", dtype)
