"""Multi-token-prediction layers: in the checkpoint, not in the model, and of the same KV heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqa_convert import convert
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config


@pytest.mark.parametrize(
    ("model_type", "layer"),
    [("glm4_moe", "model.layers.92"), ("hy_v3", "model.layers.80"), ("qwen3_next", "mtp.layers.0")],
)
def test_prediction_layers_are_merged_with_the_decoder(model_type: str, layer: str, tmp_path: Path) -> None:
    tiny_model(tiny_config(model_type)).save_pretrained(tmp_path / "mha")
    file = tmp_path / "mha" / "model.safetensors"
    tensors = load_file(file)
    like = next(key for key in tensors if key.endswith("self_attn.k_proj.weight"))
    heads = torch.randn(2, 1, *tensors[like].view(8, -1, tensors[like].shape[1]).shape[1:])
    tied = heads.expand(-1, 4, -1, -1).reshape(tensors[like].shape).contiguous()
    other = torch.randn(4, 4)
    extra = {f"{layer}.self_attn.k_proj.weight": tied, f"{layer}.self_attn.v_proj.weight": tied.clone()}
    save_file({**tensors, **extra, f"{layer}.eh_proj.weight": other}, file, {"format": "pt"})
    convert(tmp_path / "mha", groups=2, out=tmp_path / "gqa")
    out = load_file(tmp_path / "gqa" / "model.safetensors")
    for key in extra:
        assert torch.equal(out[key], heads.flatten(0, 2)), key
    assert torch.equal(out[f"{layer}.eh_proj.weight"], other)
