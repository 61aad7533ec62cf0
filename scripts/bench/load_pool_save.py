"""The way without a converter: load the model, pool its keys and values, save it. Llama only.

Run as a child process: python load_pool_save.py SOURCE TARGET GROUPS
"""

from __future__ import annotations

import sys
import time
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def main() -> None:
    source, target, groups = sys.argv[1], sys.argv[2], int(sys.argv[3])
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config: Any = deepcopy(model.config)
    config.num_key_value_heads = groups
    state = model.state_dict()
    for key in [key for key in state if key.endswith((".k_proj.weight", ".v_proj.weight"))]:
        heads = state[key].view(groups, -1, config.head_dim, config.hidden_size)
        state[key] = heads.float().mean(dim=1).flatten(0, 1).to(state[key].dtype)
    with torch.device("meta"):
        pooled = LlamaForCausalLM(config)
    pooled.load_state_dict(state, assign=True)
    pooled.save_pretrained(target, max_shard_size="1GB")
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
