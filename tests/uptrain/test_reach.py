"""What the loss does not reach is left out of training, so that no engine waits for its gradient."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.model import ScoredModel
from gqa_convert.uptrain.objective import LossSpec
from gqa_convert.uptrain.unused_parameters import freeze_unreached
from tests.uptrain.test_model import MODELS, build

MANY = Path(__file__).parents[2] / "scripts" / "launch" / "many_gpus.sh"


def frozen(model: Any, told: list[str] | None = None) -> list[str]:
    scored = ScoredModel(model, LossSpec())
    names = freeze_unreached(scored, (told if told is not None else []).append)
    left = {name for name, p in scored.named_parameters() if not p.requires_grad}
    assert all(any(name.startswith(f"{outer}.") for outer in names) for name in left)
    return names


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Gemma2", "GPT2"])
def test_every_parameter_of_a_text_model_is_reached(name: str) -> None:
    assert frozen(build(name, "eager", **MODELS[name]).train()) == []


def test_recomputed_activations_hide_nothing() -> None:
    model = build("Llama", **MODELS["Llama"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert frozen(model) == []


def test_a_tower_beside_the_text_is_frozen_once_and_told() -> None:
    model = build("Llama", **MODELS["Llama"])
    model.tower = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    told: list[str] = []
    assert frozen(model, told) == ["model.tower"]
    assert told == ["not trained, since text does not reach them: tower"]
    assert not model.tower[1].weight.requires_grad
    assert model.lm_head.weight.requires_grad


class Choice(nn.Module):
    """One of several experts, as a router would pick it."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: torch.Tensor) -> Any:
        return self.experts[0](x)


def test_an_expert_that_was_not_picked_is_trained_all_the_same() -> None:
    model = build("Llama", **MODELS["Llama"])
    layer = model.model.layers[0]
    layer.mlp = Choice([layer.mlp, build("Llama", **MODELS["Llama"]).model.layers[0].mlp])
    assert frozen(model) == []


@pytest.mark.slow
def test_an_image_model_is_trained_on_text_by_two_processes(
    settings: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**json.loads((tiny_folder / "config.json").read_text()))
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    folder = tmp_path / "llava"
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_id=2)  # type: ignore[call-arg]
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder)
    settings["model"] = str(folder)
    settings["budget"]["steps"] = 4
    settings["train"]["micro_batch"] = 1
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings))
    done = subprocess.run(
        ["bash", MANY, config], capture_output=True, text=True,
        env={**os.environ, "PROCESSES": "2", "ENGINE": "ddp", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "text does not reach them: model.vision_tower, model.multi_modal_projector" in done.stdout + done.stderr
    assert len([r for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if r["kind"] == "train"]) == 4
    before, after = (load_file(where / "model.safetensors") for where in (folder, Path(settings["output"]) / "final"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "vision" not in key and "multi_modal" not in key}
