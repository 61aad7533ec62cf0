"""Tiny checkpoints of every layout that is converted differently, written by transformers itself."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from gqa_convert.hf import api

_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 7,
    "projection_dim": 16,
}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_BIGCODE = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": False}


@dataclass(frozen=True)
class Base:
    """A kind of checkpoint: its class, configuration, how its weights are stored, and group counts that fit it."""

    class_name: str
    config: dict[str, Any]
    stored: str = "safetensors"
    shard_size: str = "1GB"
    groups: tuple[int, ...] = (2, 1)
    dtype: torch.dtype = torch.float32
    options: tuple[str, ...] = field(default=())


BASES: dict[str, Base] = {
    "plain": Base("LlamaForCausalLM", _LLAMA),
    "plain-bf16": Base("Qwen2ForCausalLM", _LLAMA, dtype=torch.bfloat16),
    "sharded": Base("LlamaForCausalLM", _LLAMA, shard_size="16KB"),
    "bin": Base("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}, stored="bin"),
    "bin-sharded": Base("LlamaForCausalLM", _LLAMA, stored="bin-sharded"),
    "bin-legacy": Base("LlamaForCausalLM", _LLAMA, stored="bin-legacy"),
    "fused-neox": Base("GPTNeoXForCausalLM", _NEOX),
    "fused-bigcode": Base("GPTBigCodeForCausalLM", _BIGCODE, groups=(1,)),
    "t5": Base("T5ForConditionalGeneration", _T5),
    "nested": Base(
        "LlavaForConditionalGeneration",
        {"text_config": {"model_type": "llama", **_LLAMA}, "vision_config": _VISION, "image_token_index": 63},
    ),
}


def make(folder: Path, name: str, **config: Any) -> Path:
    """Write the checkpoint of a base, the same bytes every time; `config` replaces parts of its configuration."""
    base = BASES[name]
    cls = getattr(transformers, base.class_name)
    torch.manual_seed(7)
    model = cls(cls.config_class(**json.loads(json.dumps({**base.config, **config})))).to(base.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(base.dtype) * 0.1)
    model.save_pretrained(folder, max_shard_size=base.shard_size)
    if base.stored != "safetensors":
        _as_pickle(folder, model.state_dict(), base.stored)
    (folder / "tokenizer.json").write_text('{"not": "a real tokenizer"}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "README.md").write_text("# A tiny model\n")
    return folder


def _as_pickle(folder: Path, state: dict[str, torch.Tensor], stored: str) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if stored != "bin-sharded":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=stored == "bin")
        return
    weight_map = {}
    for number in range(2):
        name = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        part = dict(list(state.items())[number::2])
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def loading_faults(folder: Path) -> dict[str, list[str]]:
    """Load a converted folder as a user would; returns what transformers says is missing or of another shape."""
    text = json.loads((folder / "config.json").read_text("utf-8-sig"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A model of our own goes by the package's classes, any other by transformers' alone.
        ours = str(text.get("model_type", "")).startswith("gqa_")
        config = api.load_config(folder, trust_remote_code=ours)
        cls: Any = api.model_class(config, folder=folder, trust_remote_code=ours)
        _, info = cls.from_pretrained(folder, config=config, output_loading_info=True, local_files_only=True)
    return {
        kind: sorted(map(str, info.get(kind) or ()))[:3]
        for kind in ("missing_keys", "mismatched_keys")
        if info.get(kind)
    }
