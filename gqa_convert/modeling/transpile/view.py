"""A checkpoint seen as one of another family: config and tensors as a transpile rule makes them, read when asked for.

Tensors that only change their name stay spans of the source's files; the others are computed each time they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.dtypes import BITS, FLOATS, torch_dtype
from gqa_convert.checkpoint.reader import Checkpoint, read_tensor
from gqa_convert.checkpoint.safetensors_file import TensorInfo
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.modeling.transpile.rule import Part, Rule, Source

if TYPE_CHECKING:
    from torch import Tensor


def transpiled(checkpoint: Checkpoint, rule: Rule, config: Any, names: Mapping[str, str]) -> Checkpoint:
    """Return a lazy view of `checkpoint` as a checkpoint of the rule's target family, with all its heads.

    Args:
        checkpoint: as it is stored.
        rule: the rule meant for its configuration.
        config: its configuration as transformers reads it.
        names: parameter name -> raw key of every tensor that its own model reads.

    Raises:
        UnsupportedModelError: if the rule would lose a tensor, or must compute with quantised weights.
        CheckpointError: if a tensor that the configuration calls for is missing.
    """
    infos = {name: checkpoint.tensors[key] for name, key in names.items()}
    source = Source(folder=checkpoint.folder, config=config, values=checkpoint.config, infos=infos)
    parts = tuple(rule.parts(source))
    _check_nothing_lost(rule, source, parts)
    tensors = {part.key: _tensor(source, part) for part in parts}
    homes = {part.key: source.info(part.home).file for part in parts}
    shards = tuple(
        replace(shard, tensors={key: t for key, t in tensors.items() if homes[key] == shard.file}, aliases={})
        for shard in checkpoint.shards
    )
    values = rule.config(source)
    return replace(
        checkpoint,
        config=values,
        config_text=json.dumps(values, indent=2) + "\n",
        shards=shards,
        tensors={key: info for shard in shards for key, info in shard.tensors.items()},
        stored=checkpoint,
    )


@dataclass(frozen=True)
class Computed:
    """Computes a tensor of a view from stored ones when it is called, in a safetensors dtype."""

    part: Part
    stored: tuple[TensorInfo, ...]
    dtype: str

    def __call__(self) -> Tensor:
        """Read what is stored and return the tensor."""
        assert self.part.make is not None
        tensor = self.part.make(*(read_tensor(info) for info in self.stored))
        assert tuple(tensor.shape) == self.part.shape, f"{self.part.key}: {tuple(tensor.shape)}, not {self.part.shape}"
        return tensor.to(torch_dtype(self.dtype)).contiguous()

    @property
    def working_bytes(self) -> int:
        """Bytes held at once: the stored tensors, two float32 copies of the result, and it."""
        stored = sum(info.nbytes for info in self.stored)
        return stored + math.prod(self.part.shape) * (8 + BITS[self.dtype] // 8)


def computed_from(info: TensorInfo) -> tuple[str, ...] | None:
    """Raw keys of the stored tensors that a view's tensor is computed from; None for a tensor that is copied."""
    return tuple(stored.key for stored in _computed(info).stored) if _is_computed(info) else None


def computing_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that computing a view's largest tensor holds at once; 0 for a plain checkpoint."""
    return max((_computed(info).working_bytes for info in checkpoint.tensors.values() if _is_computed(info)), default=0)


def widened(checkpoint: Checkpoint) -> Checkpoint:
    """Return a view whose computed tensors are given in float32, before they are rounded to the stored dtype."""
    tensors = {
        key: _described(_computed(info).part, _computed(info).stored, info, "F32") if _is_computed(info) else info
        for key, info in checkpoint.tensors.items()
    }
    shards = tuple(replace(s, tensors={key: tensors[key] for key in s.tensors}) for s in checkpoint.shards)
    return replace(checkpoint, tensors=tensors, shards=shards)


def _is_computed(info: TensorInfo) -> bool:
    return isinstance(info.load, Computed)


def _computed(info: TensorInfo) -> Computed:
    assert isinstance(info.load, Computed)
    return info.load


def _check_nothing_lost(rule: Rule, source: Source, parts: tuple[Part, ...]) -> None:
    used = {name for part in parts for name in (*part.sources, part.like)}
    lost = sorted(set(source.infos) - used)
    if lost:
        raise UnsupportedModelError(
            f"{source.folder}: {source.config.model_type} cannot be written as {rule.target} exactly: there is no "
            f"place for {lost[0]}" + (f" and {len(lost) - 1} more tensors." if len(lost) > 1 else ".")
        )


def _tensor(source: Source, part: Part) -> TensorInfo:
    home = source.info(part.home)
    if part.make is None:
        return replace(home, key=part.key)
    stored = [source.info(name) for name in part.sources]
    for name, info in zip((*part.sources, part.home), (*stored, home), strict=True):
        if info.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{info.key}: its dtype is {info.dtype}, so {name} is quantised and cannot be rewritten. "
                "Convert the unquantised checkpoint, then quantise the result."
            )
    return _described(part, tuple(stored), home, home.dtype)


def _described(part: Part, stored: tuple[TensorInfo, ...], home: TensorInfo, dtype: str) -> TensorInfo:
    return TensorInfo(
        key=part.key,
        dtype=dtype,
        shape=part.shape,
        file=home.file,
        offset=0,
        nbytes=math.prod(part.shape) * BITS[dtype] // 8,
        load=Computed(part, stored, dtype),
    )
