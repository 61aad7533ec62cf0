"""Tiny real checkpoints, written to a folder by transformers itself, each in a few tens of milliseconds.

`FAMILIES` knows a spread of architectures and, for each, how KV heads lie in its raw tensors. That knowledge is written
down here on its own, by hand, so that the tests do not ask the code under test what is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HEADS = 8
Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """One architecture: its model class, the constructor arguments of its config, and its KV field."""

    class_name: str
    config: dict[str, Any]
    kv_field: str = "num_key_value_heads"
    groups: tuple[int, ...] = (4, 2, 1)
    heads_axis: str = r"\.(k_proj|v_proj)\.(weight|bias)$"
    """Raw keys whose axis 0 holds the KV heads in a row."""
    fused: str = "$^"
    """Raw keys whose axis 0 holds queries, keys and values."""
    per_head: bool = False
    """The MHA form of the fused keys is [q k v] for each head; the GQA form is [all q, all k, all v] in any case."""
    listed: str = "$^"
    """Raw keys with one tensor a head: group 1 is the number of the head."""
    special: Callable[[Any, int], None] | None = field(default=None)

    def make_config(self, kv_heads: int = HEADS) -> Any:
        """The config of a model with that many KV heads."""
        cls = getattr(transformers, self.class_name).config_class
        values = json.loads(json.dumps(self.config))
        if self.special is None:
            owner = values
            *parents, leaf = self.kv_field.split(".")
            for name in parents:
                owner = owner[name]
            owner[leaf] = kv_heads
            return cls(**values)
        config = cls(**values)
        self.special(config, kv_heads)
        return config


def _multi_query(config: Any, kv_heads: int) -> None:
    config.multi_query = kv_heads == 1
    if hasattr(config, "num_kv_heads"):
        config.num_kv_heads = kv_heads


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", SIZES),
    "llama-bias": Family("LlamaForCausalLM", {**SIZES, "attention_bias": True}),
    "llama-head-dim": Family("LlamaForCausalLM", {**SIZES, "head_dim": 24}),
    "qwen2": Family("Qwen2ForCausalLM", SIZES),
    "qwen3": Family("Qwen3ForCausalLM", {**SIZES, "head_dim": 16}),
    "gemma": Family("GemmaForCausalLM", {**SIZES, "head_dim": 16}),
    "phi3": Family("Phi3ForCausalLM", SIZES, fused=r"\.qkv_proj\.weight$"),
    "olmo2": Family("Olmo2ForCausalLM", SIZES, heads_axis=r"\.(k_proj|v_proj|k_norm)\.(weight|bias)$"),
    "stablelm": Family(
        "StableLmForCausalLM", {**SIZES, "qk_layernorm": True}, listed=r"\.k_layernorm\.norms\.(\d+)\.weight$"
    ),
    "cohere": Family(
        "CohereForCausalLM",
        {**SIZES, "use_qk_norm": True},
        heads_axis=r"\.(k_proj|v_proj|k_norm)\.(weight|bias)$",
    ),
    "dbrx": Family(
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": HEADS,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": 128,
            "attn_config": {"kv_n_heads": HEADS, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 2, "moe_top_k": 1},
        },
        kv_field="attn_config.kv_n_heads",
        fused=r"\.Wqkv\.weight$",
    ),
    "gpt_bigcode": Family(
        "GPTBigCodeForCausalLM",
        {
            "vocab_size": 128,
            "n_positions": 64,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": HEADS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        kv_field="multi_query",
        groups=(1,),
        fused=r"\.attn\.c_attn\.(weight|bias)$",
        per_head=True,
        special=_multi_query,
    ),
    "falcon": Family(
        "FalconForCausalLM",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "bias": True,
        },
        kv_field="multi_query",
        groups=(1,),
        fused=r"\.query_key_value\.(weight|bias)$",
        per_head=True,
        special=_multi_query,
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **SIZES},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 32,
            },
            "image_token_index": 127,
        },
        kv_field="text_config.num_key_value_heads",
        heads_axis=r"language_model\..*\.(k_proj|v_proj)\.(weight|bias)$",
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                "model_type": "qwen2_vl_text",
                **SIZES,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2},
            "image_token_id": 127,
            "video_token_id": 126,
            "vision_start_token_id": 125,
            "vision_end_token_id": 124,
        },
        kv_field="text_config.num_key_value_heads",
        heads_axis=r"model\.layers.*\.(k_proj|v_proj)\.(weight|bias)$",
    ),
}


def make(
    folder: Path,
    family: str = "llama",
    *,
    kv_heads: int = HEADS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_size: str = "1GB",
) -> Path:
    """Write a checkpoint of a family with random weights, none of them left at a special value such as 0 or 1."""
    config = FAMILIES[family].make_config(kv_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, FAMILIES[family].class_name)(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
                parameter.add_(torch.randn(parameter.shape).to(dtype) * scale)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text('{"not": "a real tokenizer"}\n')
    return folder


def make_tied(folder: Path, reference: Path, family: str, groups: int) -> Path:
    """Write the MHA checkpoint that says every KV head of the GQA checkpoint `reference` once for each query head."""
    make(folder, family)
    tensors, kind = tensors_of(reference), FAMILIES[family]
    write_tensors(folder, expand(tensors, kind, groups))
    return folder


def expand(tensors: Tensors, family: Family, groups: int) -> Tensors:
    """Repeat the KV heads of raw GQA tensors, contiguously, up to as many as there are query heads."""
    expanded: Tensors = {}
    for key, x in tensors.items():
        listed = re.search(family.listed, key)
        if re.search(family.heads_axis, key):
            expanded[key] = repeat_rows(x, groups)
        elif re.search(family.fused, key):
            q, k, v = split_fused(x, groups)
            k, v = repeat_rows(k, groups), repeat_rows(v, groups)
            expanded[key] = interleave(q, k, v) if family.per_head else torch.cat([q, k, v])
        elif listed:
            times, head = HEADS // groups, int(listed.group(1))
            for copy in range(times):
                expanded[f"{key[: listed.start(1)]}{head * times + copy}{key[listed.end(1) :]}"] = x.clone()
        else:
            expanded[key] = x
    return expanded


def repeat_rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat each of `groups` blocks of rows so that there are HEADS of them."""
    blocks = x.reshape(groups, -1, *x.shape[1:])
    return blocks.repeat_interleave(HEADS // groups, dim=0).reshape(-1, *x.shape[1:])


def split_fused(x: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut [all q, all k, all v] rows into the three."""
    dim = x.shape[0] // (HEADS + 2 * kv_heads)
    q, k, v = x.split([HEADS * dim, kv_heads * dim, kv_heads * dim])
    return q, k, v


def interleave(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Lay rows out as [q k v] for each head."""
    heads = [part.reshape(HEADS, 1, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(heads, dim=1).reshape(-1, *q.shape[1:])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def tensors_of(folder: Path) -> Tensors:
    """Every raw tensor of a folder, read by the safetensors library."""
    return {key: x for file in weight_files(folder) for key, x in load_file(file).items()}


def shapes_of(folder: Path) -> dict[str, list[int]]:
    """Every raw tensor's shape."""
    shapes = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as handle:
            shapes.update({key: handle.get_slice(key).get_shape() for key in handle.keys()})  # noqa: SIM118
    return shapes


def write_tensors(folder: Path, tensors: Tensors) -> None:
    """Replace a folder's weights by one file of `tensors`."""
    for file in weight_files(folder):
        file.unlink()
    save_file({key: x.contiguous() for key, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """Rewrite a one-file checkpoint with its tensors changed in place."""
    tensors = tensors_of(folder)
    change(tensors)
    write_tensors(folder, tensors)
    return folder


def change_config(folder: Path, *removed: str, **values: Any) -> Path:
    """Set and remove top-level values of config.json."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps({**config, **values}, indent=2) + "\n")
    return folder


def load(folder: Path, family: str = "llama") -> Any:
    """Load a folder with stock transformers in float32; nothing may be missing, unexpected or of another shape."""
    cls = getattr(transformers, FAMILIES[family].class_name)
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    faults = {kind: names for kind, names in info.items() if names}
    assert not faults, faults
    return model.eval()


def token_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    """Tokens that mean nothing special to any of the families."""
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of one pass over `token_ids`, without a cache."""
    scores: torch.Tensor = model(input_ids=token_ids(), use_cache=False).logits
    return scores


def as_bytes(x: torch.Tensor) -> bytes:
    """A tensor's elements as they are stored."""
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
