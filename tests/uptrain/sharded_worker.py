"""One process of a run sharded by torch's own fully_shard over gloo: what accelerate's FSDP2 does on GPUs.

On CPU accelerate ignores its FSDP2 plugin, so this stands in for it; everything else is the product's: loss inside the
sharded forward, clipping, sharded checkpoints, gathering the final folder.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from gqa_convert.errors import Preempted
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.loading import load_config


class ShardedEngine(Engine):
    def __init__(self, config):
        super().__init__(config)
        self.name = "fsdp2"

    def prepare(self, model, optimizer):
        for layer in model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    @contextmanager
    def accumulating(self, model, *, last):
        model.set_requires_gradient_sync(last)
        yield


def main(config, *overrides):
    stop_at = None
    if overrides and overrides[0].startswith("stop="):
        stop_at, overrides = int(overrides[0][5:]), overrides[1:]
    real = loop.train_step

    def train_step(parts, guards, at, *, stop, save):
        return real(parts, guards, at, stop=stop or at + 1 == stop_at, save=save)

    loop.train_step = train_step
    loop.Engine = ShardedEngine
    try:
        loop.uptrain(load_config(Path(config), overrides))
    except Preempted as error:
        sys.stdout.write(f"{error}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
