"""Small checkpoint folders for these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def tensors(layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = {"embed.weight": torch.randn(11, 8, generator=generator)}
    for i in range(layers):
        for name in ("q", "k", "v", "o"):
            table[f"layers.{i}.{name}.weight"] = torch.randn(8, 8, generator=generator)
        table[f"layers.{i}.norm.weight"] = torch.randn(8, generator=generator)
    return {key: value.to(dtype) for key, value in table.items()}


def write_config(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **values}, indent=2))


def single(folder: Path, table: dict[str, torch.Tensor] | None = None, name: str = "model.safetensors") -> Path:
    write_config(folder)
    save_file(table or tensors(), folder / name, metadata={"format": "pt"})
    return folder


def sharded(folder: Path, count: int = 2) -> Path:
    """A checkpoint of `count` safetensors shards and their index."""
    write_config(folder)
    table = tensors()
    weight_map: dict[str, str] = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: value for n, (key, value) in enumerate(table.items()) if n % count == i}
        save_file(part, folder / name, metadata={"format": "pt", "part": str(i)})
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, Any], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def raw_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
