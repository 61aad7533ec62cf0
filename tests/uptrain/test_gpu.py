"""On GPUs: one device in every precision, and each engine through the launchers on as many as there are."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils.import_utils import is_flash_attn_2_available

from gqa_convert.uptrain import loop
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.model import check_isolation
from gqa_convert.uptrain.read_config import parse_config
from tests.support import load_with_info
from tests.uptrain.test_model import MODELS, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MANY = Path(__file__).parents[2] / "scripts" / "launch" / "many_gpus.sh"


@pytest.fixture
def on_gpu(settings: dict[str, Any]) -> dict[str, Any]:
    settings["train"] |= {"device": "auto", "batch_sequences": 8, "micro_batch": 1}
    return settings


def losses(output: Path | str) -> list[float]:
    return [r["loss"] for r in read_metrics(Path(output) / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize(
    "train",
    [
        {"precision": "float32", "deterministic": True},
        {"precision": "bf16"},
        {"precision": "pure_bf16"},
        {"precision": "bf16", "compile": True},
        {"precision": "bf16", "gradient_checkpointing": True, "parameters": "attention"},
    ],
    ids=["float32", "bf16", "pure-bf16", "compile", "checkpointing"],
)
def test_one_device_learns(on_gpu: dict[str, Any], teacher_folder: Path, train: dict[str, Any]) -> None:
    on_gpu["train"] |= train
    on_gpu["objective"] = {"distillation": {"teacher": str(teacher_folder), "cross_entropy_weight": 1.0}}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    result = loop.uptrain(parse_config(on_gpu), quiet=True)
    torch.use_deterministic_algorithms(False)
    assert result.loss_after < result.loss_before
    _, info = load_with_info(result.folder)
    assert not any(info.values())


def test_float32_losses_are_those_of_the_cpu(on_gpu: dict[str, Any], tmp_path: Path) -> None:
    loop.uptrain(parse_config(on_gpu), quiet=True)
    there = {**on_gpu, "output": str(tmp_path / "cpu"), "train": {**on_gpu["train"], "device": "cpu"}}
    loop.uptrain(parse_config(there), quiet=True)
    assert losses(on_gpu["output"]) == pytest.approx(losses(there["output"]), abs=5e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_documents_are_kept_apart_on_every_backend(attention: str) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    # Flash and flex kernels want heads of 16 at least.
    shape = {**MODELS["Llama"], "hidden_size": 128, "num_attention_heads": 4}
    assert check_isolation(build("Llama", attention, **shape).cuda()) < 5e-2


def launch(path: Path, engine: str, *overrides: str) -> subprocess.Popen[str]:
    count = torch.cuda.device_count()
    return subprocess.Popen(
        ["bash", MANY, str(path), *overrides],
        env={**os.environ, "ENGINE": engine, "PROCESSES": str(min(count, 8)), "PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_every_engine_stops_resumes_and_matches_one_device(
    on_gpu: dict[str, Any],
    teacher_folder: Path,
    write_config: Callable[..., Path],
    tmp_path: Path,
    engine: str,
    precision: str,
) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    on_gpu["train"] |= {"precision": precision}
    on_gpu["objective"] = {"distillation": {"teacher": str(teacher_folder), "cross_entropy_weight": 1.0}}
    on_gpu["budget"] = {"steps": 60}
    on_gpu["guards"] = {"spike_factor": None}
    one = loop.uptrain(parse_config({**on_gpu, "output": str(tmp_path / "one")}), quiet=True)
    path, output = write_config(on_gpu), Path(on_gpu["output"])
    first = launch(path, engine)
    deadline = time.monotonic() + 300
    while not ((output / "metrics.jsonl").exists() and len(losses(output)) >= 3):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=300)[0]
    # A tiny model may be through before the signal comes.
    assert first.returncode in (75, 0), said
    second = launch(path, engine)
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
    assert f"engine {engine}" in said
    actual, expected = losses(output), losses(tmp_path / "one")
    assert len(actual) == 60
    tolerance = 5e-3 if precision == "float32" else 5e-2
    assert actual == pytest.approx(expected, abs=tolerance)
    ours, theirs = (load_file(Path(f) / "model.safetensors") for f in (output / "final", one.folder))
    assert ours.keys() == theirs.keys()
    _, info = load_with_info(output / "final")
    assert not any(info.values())
