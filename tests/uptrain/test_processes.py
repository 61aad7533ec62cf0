"""More than one process, over gloo on CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gqa_convert.uptrain import loop
from gqa_convert.uptrain.loading import parse_config
from gqa_convert.uptrain.metrics import read_metrics

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture
def single(settings, tmp_path):
    result = loop.uptrain(parse_config({**settings, "output": str(tmp_path / "single")}), quiet=True)
    return result, read_metrics(tmp_path / "single" / "metrics.jsonl")


def close(a, b, tolerance=1e-5):
    found = [(x["loss"], y["loss"]) for x, y in zip(a, b, strict=True) if "loss" in x]
    return len(found) == 20 and all(abs(x - y) < tolerance for x, y in found)


def launch(script, *arguments, **environment):
    return subprocess.Popen(
        ["bash", LAUNCH / script, *map(str, arguments)],
        env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_processes_save_and_stop_with_75(settings, write_config):
    settings["train"]["micro_batch"] = 1
    path = write_config(settings)
    output = Path(settings["output"])
    # Long enough that the signal always comes in time.
    first = launch("many_gpus.sh", path, "--set", "budget.steps=100000", ENGINE="ddp", PROCESSES="2")
    deadline = time.monotonic() + 240
    while not ((output / "metrics.jsonl").exists() and '"train"' in (output / "metrics.jsonl").read_text()):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 75, said
    assert "engine ddp, 2 processes" in said
    assert "Run the same command again" in said


@pytest.mark.slow
def test_two_processes_match_one_with_twice_the_accumulation(settings, single, write_config):
    settings["train"]["micro_batch"] = 1
    done = launch("many_gpus.sh", write_config(settings), ENGINE="ddp", PROCESSES="2")
    said = done.communicate()[0]
    assert done.returncode == 0, said
    assert close(read_metrics(Path(settings["output"]) / "metrics.jsonl"), single[1])


def test_a_silent_downgrade_is_refused(settings, write_config):
    # accelerate's launcher starts one process on a CPU without mpirun, and ignores FSDP there.
    done = launch("many_gpus.sh", write_config(settings), ENGINE="fsdp2", PROCESSES="1")
    said = done.communicate()[0]
    assert done.returncode == 2, said
    assert "engine fsdp2 was asked for" in said


@pytest.mark.slow
def test_sharded_training_matches_and_resumes(settings, single, write_config):
    settings["train"]["micro_batch"] = 1
    path = write_config(settings)
    worker = Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, path]
    for extra in (["stop=10"], []):
        done = subprocess.run([*command, *extra], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("stopped" in done.stdout) == bool(extra)
    output = Path(settings["output"])
    assert (output / "checkpoints" / "step-00000020" / "shards").is_dir()
    trained, expected = (
        [r for r in found if r["kind"] == "train"] for found in (read_metrics(output / "metrics.jsonl"), single[1])
    )
    assert close(trained, expected)
    ours, theirs = (
        load_file(Path(folder) / "final" / "model.safetensors") for folder in (output, single[0].folder.parent)
    )
    assert all(torch.allclose(ours[key], theirs[key], atol=2e-4) for key in theirs)
    _, info = AutoModelForCausalLM.from_pretrained(output / "final", output_loading_info=True)
    assert not info["missing_keys"]
