"""`gqa uptrain export`: a plain model from any checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.errors import CheckpointError, OutputError, UsageError
from gqa_convert.uptrain import loop, shards
from gqa_convert.uptrain.checkpoints import MARKER, STATE
from gqa_convert.uptrain.from_checkpoint import export_checkpoint
from gqa_convert.uptrain.read_config import parse_config
from tests.support import load_with_info
from tests.uptrain.conftest import make_tiny, mark_again


def run(settings: dict[str, Any], **train: Any) -> Path:
    settings["budget"] = {"steps": 4}
    settings["checkpoints"] = {"every_steps": 2}
    settings["train"] |= train
    return loop.uptrain(parse_config(settings), quiet=True).folder


def same(one: Path, two: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("parameters", ["all", "attention", "lora"])
def test_the_last_checkpoint_is_the_result(settings: dict[str, Any], tmp_path: Path, parameters: str) -> None:
    if parameters == "lora":
        pytest.importorskip("peft")
    final = run(settings, parameters=parameters)
    folder, step = export_checkpoint(Path(settings["output"]), tmp_path / "plain")
    assert step == 4
    assert same(final, folder)
    assert (folder / "config.json").read_bytes() == (final / "config.json").read_bytes()
    assert {p.name for p in folder.iterdir()} == {p.name for p in final.iterdir()}
    _, info = load_with_info(folder)
    assert not any(info.values())
    assert AutoTokenizer.from_pretrained(folder)("cat")["input_ids"]
    story = json.loads((folder / "gqa_convert.json").read_text())["uptraining"]
    assert (story["steps"], story["tokens"]) == (4, 4 * 4 * 32)
    assert story["held_out_loss"]["before"] > 0
    assert str(tmp_path) not in json.dumps(story)


def test_by_command_of_a_step_in_the_middle(settings: dict[str, Any], tmp_path: Path) -> None:
    final = run(settings)
    runner = CliRunner()
    arguments = ["uptrain", "export", settings["output"], "--step", "2", "--out", str(tmp_path / "plain")]
    told = runner.invoke(app, [*arguments, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == {"schema_version": 1, "folder": str(tmp_path / "plain"), "step": 2}
    saved = load_file(Path(settings["output"]) / "checkpoints/step-00000002/model.safetensors")
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(saved[f"model.{key}"], written[key]) for key in written)
    assert not same(final, tmp_path / "plain")
    with pytest.raises(OutputError, match="--force"):
        export_checkpoint(Path(settings["output"]), tmp_path / "plain")
    again, step = export_checkpoint(
        Path(settings["output"]) / "checkpoints/step-00000004", tmp_path / "plain", force=True
    )
    assert step == 4
    assert same(final, again)


def test_from_shards(settings: dict[str, Any], tmp_path: Path) -> None:
    final = run(settings)
    newest = Path(settings["output"]) / "checkpoints" / "step-00000004"
    whole = nn.Module()
    whole.model = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        whole.model.model.norm.weight.add_(1.0)
    shards.save_shards(newest, whole, torch.optim.AdamW(whole.parameters()))
    (newest / "model.safetensors").unlink()
    (newest / "optimizer.pt").unlink()
    mark_again(newest)
    folder, _ = export_checkpoint(Path(settings["output"]), tmp_path / "plain")
    written, before = (load_file(f / "model.safetensors") for f in (folder, final))
    assert {key for key in before if not torch.equal(before[key], written[key])} == {"model.norm.weight"}
    assert torch.equal(written["model.norm.weight"], before["model.norm.weight"] + 1)


def test_what_cannot_be_exported_is_said(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings)
    output = Path(settings["output"])
    with pytest.raises(UsageError, match="holds no checkpoints"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "plain")
    with pytest.raises(UsageError, match="of steps 2, 4"):
        export_checkpoint(output, tmp_path / "plain", step=3)
    with pytest.raises(CheckpointError, match="not the model that the run started from"):
        export_checkpoint(output, tmp_path / "plain", model=str(make_tiny(tmp_path / "other", seed=9)))
    shutil.copytree(settings["model"], tmp_path / "moved")
    assert export_checkpoint(output, tmp_path / "plain", model=str(tmp_path / "moved"))[1] == 4
    newest = output / "checkpoints" / "step-00000004"
    (newest / MARKER).write_text("[]")
    told: list[str] = []
    assert export_checkpoint(output, tmp_path / "older", tell=told.append)[1] == 2
    assert "step-00000004" in told[0]
    state = output / "checkpoints" / "step-00000002" / STATE
    state.write_text("{}")
    with pytest.raises(CheckpointError, match="none of its checkpoints"):
        export_checkpoint(output, tmp_path / "plain2")
    assert not (tmp_path / "plain2").exists()
