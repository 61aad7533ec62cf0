"""One process of a run under accelerate's own FSDP2 or DDP (as ENGINE says), over gloo: `stop=N CONFIG [--set ...]`.

On a CPU accelerate leaves its FSDP plugin out. Here it is put in after all, so that what runs is what runs on GPUs:
accelerate's wrapping by layers, its swap of the optimiser's parameters, `no_sync`, and everything of the product.
"""

import os
import sys
from pathlib import Path
from typing import Any

from gqa_convert.errors import Preempted
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.engine import Engine
from gqa_convert.uptrain.read_config import load_config


class ShardedEngine(Engine):
    def __init__(self, config: UptrainConfig) -> None:
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType

        super().__init__(config)
        plugin = FullyShardedDataParallelPlugin()  # of the environment that the launcher has set
        state = self.accelerator.state
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        assert self.accelerator.is_fsdp2
        self.name = "fsdp2"


def main(stop: str, config: str, *overrides: str) -> None:
    number = int(stop.removeprefix("stop="))
    patched: Any = loop
    real = patched.train_step

    def train_step(parts: Any, guards: Any, at: int, *, stop: bool, save: bool) -> Any:
        return real(parts, guards, at, stop=stop or at + 1 == number, save=save)

    patched.train_step = train_step
    if os.environ["ENGINE"] == "fsdp2":
        patched.Engine = ShardedEngine
    try:
        loop.uptrain(load_config(Path(config), overrides))
    except Preempted as error:
        sys.stdout.write(f"{error}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
