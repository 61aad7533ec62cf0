"""Write a large bf16 Llama of random weights, one tensor at a time.

Run as a child process: python big_llama.py FOLDER --layers 24 --hidden 2048 --heads 32 --shards 4
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard

VOCABULARY = 32_000


def llama_config(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """A Llama config.json in the proportions of Llama 2."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the model, in the order of its layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            yield f"{layer}.self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def random_tensor(key: str, shape: tuple[int, ...]) -> TargetTensor:
    """A tensor that is drawn when it is written."""

    def draw() -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else (torch.randn(shape) * 0.02).bfloat16()

    return TargetTensor(key=key, dtype="BF16", shape=shape, produce=draw)


def write(folder: Path, config: dict[str, Any], shards: int) -> None:
    """Write the checkpoint, its tensors dealt to `shards` files of about the same size."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = [random_tensor(key, shape) for key, shape in shapes(config)]
    total = sum(tensor.nbytes for tensor in tensors)
    parts: list[list[TargetTensor]] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        parts[min(shards - 1, done * shards // total)].append(tensor)
        done += tensor.nbytes
    if shards == 1:
        write_shard(folder / "model.safetensors", tensors, {"format": "pt"})
        return
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for name, part in zip(names, parts, strict=True):
        write_shard(folder / name, part, {"format": "pt"})
    weight_map = {tensor.key: name for name, part in zip(names, parts, strict=True) for tensor in part}
    write_index(folder / "model.safetensors.index.json", weight_map, total, total // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("layers", "hidden", "heads", "shards"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    write(args.folder, llama_config(args.layers, args.hidden, args.heads), args.shards)


if __name__ == "__main__":
    main()
