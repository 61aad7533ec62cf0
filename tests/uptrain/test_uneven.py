"""Training models whose layers differ in KV heads: the result keeps them, its code, and its record."""

import json
from pathlib import Path
from typing import Any

import torch

from gqa_convert import convert
from gqa_convert.conversion.inspect import inspect, verify_pair
from gqa_convert.hf.loading import Source, load_model
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.read_config import parse_config


def test_a_trained_folder_keeps_the_heads_of_each_layer(
    settings: dict[str, Any], teacher_folder: Path, tmp_path: Path
) -> None:
    converted = convert(teacher_folder, groups=[4, 1], out=tmp_path / "converted").out
    settings |= {"model": str(converted), "budget": {"steps": 2}}
    settings["objective"] = {"distillation": {"teacher": str(teacher_folder)}}
    final = loop.uptrain(parse_config(settings), quiet=True).folder
    assert inspect(final).layout.per_layer == (4, 1)
    assert (final / "modeling_uneven.py").is_file()
    values = json.loads((final / "config.json").read_text())
    assert values["auto_map"]["AutoModelForCausalLM"] == "modeling_uneven.DeciLMForCausalLM"
    checks = verify_pair(teacher_folder, final)
    assert checks["trained"]
    assert not checks["differing"]
    before, after = (load_model(Source.open(folder), dtype=torch.float32) for folder in (converted, final))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert before.state_dict()[name].shape == after.state_dict()[name].shape
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])
