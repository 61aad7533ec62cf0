"""Models that no process ever holds whole: built without memory, filled a layer at a time, each layer sharded at once.

A process holds its share of the weights, one whole layer, and what lies outside of layers. What has to be known of the
model before (does it keep documents apart? are logits a matrix product?) is asked of a tiny model of the same
architecture and settings, whose code is the same.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from gqa_convert.errors import GQAConvertError, UsageError
from gqa_convert.hf.loading import Source
from gqa_convert.hf.partial import PartialModel
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import shrink
from gqa_convert.uptrain.model import check_finite


def tiny_twin(source: Source, attention: str) -> Any | None:
    """A tiny random model with the source's code and settings, to try things on; None where none can be made.

    Args:
        source: the checkpoint.
        attention: implementation of the attention.
    """
    if source.stored is not None or getattr(source.config, "is_encoder_decoder", False):
        return None
    try:
        config = shrink(source.config)
        config._attn_implementation = attention
        twin = tiny_model(config, cls=source.model_class)
    except (GQAConvertError, AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return None  # not every architecture can be made small
    return twin if twin.config._attn_implementation == attention else None


def load_sharded(
    source: Source, *, dtype: torch.dtype, attention: str, policy: Any, device: torch.device, reshard: bool = True
) -> Any:
    """Load a model with its layers sharded over all processes; what lies outside of them is whole, for the root.

    Called by every process. Whoever wraps the model shards the rest, by `shard_rest`.

    Args:
        source: the checkpoint.
        dtype: of the weights.
        attention: an attention implementation of transformers.
        policy: torch's `MixedPrecisionPolicy`.
        device: of this process.
        reshard: give gathered layers back after the forward pass.

    Raises:
        CheckpointError: if a tensor is missing, of another shape, or not finite.
    """
    from torch.distributed.fsdp import fully_shard

    config = deepcopy(source.config)
    config._attn_implementation = attention
    parts = PartialModel(source.checkpoint, source.model_class, config, dtype=dtype)
    mesh = _mesh(device)
    for path in parts.layers:
        layer = parts.load(path)
        check_finite(layer, f"{source.folder}: {path}")
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    check_finite(parts.model, str(source.folder))
    return parts.model


def shard_rest(module: nn.Module, *, policy: Any, device: torch.device) -> nn.Module:
    """Shard what is still whole of a model whose layers are sharded; computed buffers go to the device."""
    from torch.distributed.fsdp import fully_shard

    from gqa_convert.hf.partial import move_buffers

    move_buffers(module, device)
    fully_shard(module, mesh=_mesh(device), mp_policy=policy)
    return module


def reshard(module: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has left whole: the root's weights, in bf16 perhaps.

    Parameters that are looked at in between would be those, and what is written to them would be lost.
    """
    if not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _mesh(device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        raise UsageError("engine fsdp2 needs several processes. Start it by torchrun or accelerate launch.")
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))
