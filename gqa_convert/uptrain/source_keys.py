"""The final folder's tensors under the keys of the source, and those beside them that the model's code does not read.

transformers writes parameters under its own names. The hub's GPT-2, OPT or BLOOM go without the prefix that these have,
and old checkpoints hold buffers (masks, `inv_freq`) or layers that no code reads any more.
"""

from __future__ import annotations

import os
from pathlib import Path

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.resolve import SAFE_INDEX
from gqa_convert.checkpoint.safetensors_file import TensorInfo
from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard
from gqa_convert.hf.api import KeyMap


def restore_keys(stage: Path, source: Checkpoint, key_map: KeyMap) -> None:
    """Rewrite the weight files of `stage` where their keys are not the source's.

    Args:
        stage: a folder that transformers has saved the trained model to.
        source: the checkpoint that training started from.
        key_map: of its model.

    Raises:
        OSError: if writing fails.
    """
    if key_map.exact_only:
        return
    written = Checkpoint.open(stage)
    renamed = _renamed(written, source, key_map)
    unread = [info for key, info in source.tensors.items() if key not in written.tensors and not key_map.targets(key)]
    if not renamed and not unread:
        return
    weight_map: dict[str, str] = {}
    total = 0
    for shard in written.shards:
        tensors = [_target(renamed.get(key, key), info) for key, info in shard.tensors.items()]
        if shard is written.shards[-1]:
            tensors += [_target(info.key, info) for info in unread]
        new = shard.file.with_name(f"{shard.name}.new")
        write_shard(new, tensors, dict(shard.metadata))
        os.replace(new, stage / shard.name)
        weight_map |= {tensor.key: shard.name for tensor in tensors}
        total += sum(tensor.nbytes for tensor in tensors)
    if written.is_sharded:
        write_index(stage / SAFE_INDEX, weight_map, total, sum(p.numel() for p in key_map.names.values()))


def _renamed(written: Checkpoint, source: Checkpoint, key_map: KeyMap) -> dict[str, str]:
    """Written key -> the key that the source has for the same parameter, where they differ."""
    waiting = {key_map.targets(key): key for key in source.tensors if key not in written.tensors}
    own_names = {key: waiting.get(key_map.targets(key)) for key in written.tensors if key not in source.tensors}
    return {key: own for key, own in own_names.items() if own is not None and len(key_map.targets(own)) == 1}


def _target(key: str, info: TensorInfo) -> TargetTensor:
    return TargetTensor(key=key, dtype=info.dtype, shape=info.shape, source=info)
