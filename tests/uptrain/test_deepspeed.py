"""DeepSpeed's ZeRO-3: two processes over gloo on CPU do what one does without it."""

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.uptrain import loop, zero
from gqa_convert.uptrain.from_checkpoint import export_checkpoint
from gqa_convert.uptrain.guards import Guards
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import parse_config
from tests.support import load_with_info

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="DeepSpeed is not installed")


def launch(path: Path, *overrides: str) -> None:
    many: list[Any] = ["bash", ROOT / "scripts" / "launch" / "many_gpus.sh", path, *overrides]
    done = subprocess.run(
        many, env={**ENVIRONMENT, "ENGINE": "deepspeed", "PROCESSES": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def launch_and_stop(path: Path) -> None:
    worker = Path(__file__).with_name("deepspeed_worker.py")
    script = '. "$1"; shift; exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "start", ROOT / "scripts" / "launch" / "engine.sh", worker, "skip=6", "stop=10", path],
        env={**ENVIRONMENT, "ENGINE": "deepspeed"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped by" in done.stdout


def losses(output: Path | str, name: str = "loss") -> list[float]:
    return [record[name] for record in read_metrics(Path(output) / "metrics.jsonl") if name in record]


def test_what_cannot_work_is_refused_in_one_line(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", type(sys)("deepspeed"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    settings["optimizer"] = {"kind": "adafactor"}
    settings["train"] |= {"parameters": "lora", "precision": "pure_bf16", "compile": True}
    with pytest.raises(UsageError) as caught:
        zero.zero_plugin(parse_config(settings))
    for word in ("launcher", "device=cpu", "adafactor", "lora", "pure_bf16", "compile", "stage 2", "offload_param"):
        assert word in str(caught.value)


def test_without_the_package_it_says_how_to_get_it(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert zero.zero_plugin(parse_config(settings)) is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"pip install 'gqa-convert\[deepspeed\]'"):
        zero.zero_plugin(parse_config(settings))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["EVIL"],))


@pytest.mark.slow
@needs_deepspeed
def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with zero._tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "evil").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.slow
@needs_deepspeed
def test_losses_resuming_and_the_result_are_those_of_one_process(
    settings: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Guards.accepts
    with monkeypatch.context() as patch:
        patch.setattr(Guards, "accepts", lambda self, *, step, **seen: real(self, step=step, **seen) and step != 6)
        single = loop.uptrain(parse_config({**settings, "output": str(tmp_path / "single")}), quiet=True)
    settings["train"] |= {"micro_batch": 1, "device": "auto"}
    path = write_config(settings)
    launch_and_stop(path)
    launch(path)
    output = Path(settings["output"])
    assert [(r["event"], r["step"]) for r in read_metrics(output / "metrics.jsonl") if "event" in r] == [
        ("resumed", 10)
    ]
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("held_out_loss", 1e-5)):
        ours, theirs = losses(output, name), losses(tmp_path / "single", name)
        assert len(ours) == (2 if name == "held_out_loss" else 20)
        assert ours == pytest.approx(theirs, abs=tolerance)
    final, alone = (load_file(folder / "model.safetensors") for folder in (output / "final", single.folder))
    assert final.keys() == alone.keys()
    assert all(torch.allclose(final[key], alone[key], atol=2e-4) for key in alone)
    _, info = load_with_info(output / "final")
    assert not info["missing_keys"]
    exported, step = export_checkpoint(output, tmp_path / "plain")
    assert step == 20
    plain = load_file(exported / "model.safetensors")
    assert all(torch.equal(plain[key], final[key]) for key in final)
    # One process has no DeepSpeed: it must not take the checkpoint for its own.
    settings["train"] |= {"device": "cpu"}
    with pytest.raises(CheckpointError, match="DeepSpeed's weights; resume with the engine"):
        loop.uptrain(parse_config({**settings, "budget": {"steps": 20}}), quiet=True)


@pytest.mark.slow
@needs_deepspeed
def test_bf16_attention_only_with_a_teacher_and_recomputed_activations(
    settings: dict[str, Any], teacher_folder: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    settings["objective"] = {"distillation": {"teacher": str(teacher_folder), "cross_entropy_weight": 0.5}}
    settings["train"] |= {"precision": "bf16", "parameters": "attention", "gradient_checkpointing": True}
    single = loop.uptrain(parse_config({**settings, "output": str(tmp_path / "single")}), quiet=True)
    settings["train"] |= {"micro_batch": 1, "device": "auto"}
    path = write_config(settings)
    launch_and_stop(path)
    launch(path)
    actual, expected = losses(settings["output"]), losses(tmp_path / "single")
    # The sixth step was skipped here and not there, and bf16 rounds every exchange of gradients.
    assert actual[:6] == pytest.approx(expected[:6], rel=1e-3)
    assert actual[-1] == pytest.approx(expected[-1], rel=0.01)
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (Path(settings["output"]) / "final", single.folder)
    )
    frozen = "model.embed_tokens.weight"
    assert torch.equal(ours[frozen], theirs[frozen])
