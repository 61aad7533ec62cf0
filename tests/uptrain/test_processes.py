"""More than one process, over gloo on CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gqa_convert.errors import Preempted
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.checkpoints import damage
from gqa_convert.uptrain.loop import UptrainResult
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import parse_config
from gqa_convert.uptrain.step import train_step as real_step
from tests.support import load_with_info

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture
def single(settings: dict[str, Any], tmp_path: Path) -> tuple[UptrainResult, list[dict[str, Any]]]:
    result = loop.uptrain(parse_config({**settings, "output": str(tmp_path / "single")}), quiet=True)
    return result, read_metrics(tmp_path / "single" / "metrics.jsonl")


def close(a: list[dict[str, Any]], b: list[dict[str, Any]], tolerance: float = 1e-5) -> bool:
    pairs = [(x["loss"], y["loss"]) for x, y in zip(a, b, strict=True) if "loss" in x]
    return len(pairs) == 20 and all(abs(x - y) < tolerance for x, y in pairs)


def launch(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", LAUNCH / script, *map(str, arguments)],
        env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_processes_save_and_stop_with_75(settings: dict[str, Any], write_config: Callable[..., Path]) -> None:
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
def test_one_process_chooses_the_checkpoint_for_all(
    settings: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    settings["train"]["micro_batch"] = 1
    settings["checkpoints"] = {"resume": str(tmp_path / "nothing")}
    done = launch("many_gpus.sh", write_config(settings), ENGINE="ddp", PROCESSES="2")
    said = done.communicate(timeout=240)[0]
    assert done.returncode == 4, said
    assert said.count("it was never finished") == 2  # what the first found out, the second says too


@pytest.mark.slow
def test_two_processes_match_one_with_twice_the_accumulation(
    settings: dict[str, Any], single: tuple[UptrainResult, list[dict[str, Any]]], write_config: Callable[..., Path]
) -> None:
    settings["train"]["micro_batch"] = 1
    done = launch("many_gpus.sh", write_config(settings), ENGINE="ddp", PROCESSES="2")
    said = done.communicate()[0]
    assert done.returncode == 0, said
    assert close(read_metrics(Path(settings["output"]) / "metrics.jsonl"), single[1])


def test_a_silent_downgrade_is_refused(settings: dict[str, Any], write_config: Callable[..., Path]) -> None:
    # accelerate's launcher starts one process on a CPU without mpirun, and ignores FSDP there.
    done = launch("many_gpus.sh", write_config(settings), ENGINE="fsdp2", PROCESSES="1")
    said = done.communicate()[0]
    assert done.returncode == 2, said
    assert "engine fsdp2 was asked for" in said


def test_a_batch_that_the_processes_cannot_share_is_refused_before_the_text_is_read(
    settings: dict[str, Any], write_config: Callable[..., Path]
) -> None:
    settings["train"]["batch_sequences"] = 2
    done = launch("many_gpus.sh", write_config(settings), ENGINE="ddp", PROCESSES="2")
    said = done.communicate()[0]
    assert done.returncode == 2, said
    assert "no multiple of micro_batch 2 x 2 processes" in said
    assert not (Path(settings["output"]) / "tokens").exists()


def launch_sharded(path: Path, stop: int, engine: str = "fsdp2") -> None:
    """Start the stand-in for accelerate's FSDP2 (or DDP) with the environment of accelerate's own launcher."""
    worker = Path(__file__).with_name("sharded_worker.py")
    script = '. "$1"; shift; export FSDP_CPU_RAM_EFFICIENT_LOADING=true; exec "$PYTHON" -m torch.distributed.run "$@"'
    started: list[Any] = ["--standalone", "--nproc-per-node", "2", worker, f"stop={stop}", path]
    done = subprocess.run(
        ["bash", "-c", script, "start", LAUNCH / "engine.sh", *started],
        env={**ENVIRONMENT, "ENGINE": engine, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
             **({"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {})},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("stopped" in done.stdout) == (stop > 0)


@pytest.mark.slow
def test_sharded_gradients_are_those_of_one_process(
    settings: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """FSDP2 set up as on GPUs, gradients summed in float32, at 1, 8 and 64 micro-batches a step."""
    path, worker = write_config(settings), Path(__file__).with_name("gradient_worker.py")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    gradients = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes > 1 else []
        script = '. "$1"; shift; exec "$PYTHON" "$@"'
        engine = "fsdp2" if processes > 1 else "ddp"
        command: list[Any] = ["bash", "-c", script, "start", LAUNCH / "engine.sh", *launcher, worker, out, path]
        done = subprocess.run(command, env={**environment, "ENGINE": engine}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        gradients[processes] = torch.load(out)
    errors = {}
    for (precision, sync, accumulations), sharded in gradients[2].items():
        single = gradients[1][precision, sync, accumulations]
        names = list(single["gradient"])
        one, two = (torch.cat([side["gradient"][name].flatten() for name in names]) for side in (single, sharded))
        errors[precision, sync, accumulations] = float((one - two).norm() / one.norm())
        assert torch.allclose(single["losses"], sharded["losses"], rtol=1e-6 if precision == "float32" else 1e-3)
        times = accumulations if sync == "micro_batch" else 1
        assert sharded["reductions"] == times * gradients[2][precision, sync, 1]["reductions"] > 0
    for (precision, sync, accumulations), error in errors.items():
        if precision == "float32":
            assert error < 1e-6, (sync, accumulations, error)
        else:
            # Each micro-batch's gradient is rounded to bf16, and no sum of them is: the error does not grow with them.
            assert error <= 1.05 * errors[precision, sync, 1] < 0.01, (sync, accumulations, error)


def final_weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "final" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [
        ({"kind": "adamw"}, 1e-5),
        ({"kind": "muon"}, 1e-3),  # computes in bf16
        ({"kind": "muon", "per_head": True, "outside_attention": 0.5, "relative": True}, 1e-3),
    ],
    ids=["adamw", "muon", "muon-per-head"],
)
def test_sharded_training_matches_and_resumes(
    optimizer: dict[str, Any],
    tolerance: float,
    settings: dict[str, Any],
    request: pytest.FixtureRequest,
    write_config: Callable[..., Path],
) -> None:
    settings["optimizer"] = optimizer
    single = request.getfixturevalue("single")
    settings["train"]["micro_batch"] = 1
    path = write_config(settings)
    launch_sharded(path, stop=10)
    launch_sharded(path, stop=0)
    output = Path(settings["output"])
    assert (output / "checkpoints" / "step-00000020" / "shards").is_dir()
    trained, expected = (
        [r for r in records if r["kind"] == "train"] for records in (read_metrics(output / "metrics.jsonl"), single[1])
    )
    assert close(trained, expected, tolerance)
    pairs = zip(trained, expected, strict=True)
    assert all(abs(a["grad_norm"] - b["grad_norm"]) < 10 * tolerance for a, b in pairs)
    ours, theirs = final_weights(output), final_weights(single[0].folder.parent)
    assert all(torch.allclose(ours[key], theirs[key], atol=20 * tolerance) for key in theirs)
    _, info = load_with_info(output / "final")
    assert not info["missing_keys"]


def stop_here(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop a run of this process after `step`, as a signal would."""
    real = real_step
    monkeypatch.setattr(
        loop, "train_step", lambda *args, stop, **rest: real(*args, stop=stop or args[2] + 1 == step, **rest)
    )


def alone(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Run with one process in place, to the end or until it stops."""
    stop_here(monkeypatch, stop)
    with pytest.raises(Preempted) if stop else nullcontext():
        loop.uptrain(parse_config(settings), quiet=True)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("legs", "streaming"),
    [
        (("single", "ddp", "single"), True),
        pytest.param(("ddp", "single", "ddp"), False, marks=pytest.mark.slow),
        pytest.param(("ddp", "fsdp2", "single"), False, marks=pytest.mark.slow),
        pytest.param(("single", "fsdp2", "ddp"), True, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "streaming" if value else "stored",
)
def test_any_engine_goes_on_from_any_others_checkpoint(
    settings: dict[str, Any],
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    legs: tuple[str, ...],
    streaming: bool,
) -> None:
    settings["train"]["micro_batch"] = 1
    settings["data"] |= {"streaming": streaming, "window": 4}
    undisturbed = loop.uptrain(parse_config({**settings, "output": str(tmp_path / "single")}), quiet=True)
    path = write_config(settings)
    output = Path(settings["output"])
    for engine, stop in zip(legs, (7, 14, 0), strict=True):
        if engine == "single":
            alone(settings, monkeypatch, stop)
        else:
            launch_sharded(path, stop, engine)
        saved = output / "checkpoints" / f"step-{stop or 20:08d}"
        assert (saved / "shards").is_dir() == (engine == "fsdp2")
        assert {"model.safetensors", "optimizer.pt"}.issubset(p.name for p in saved.iterdir()) == (engine != "fsdp2")
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (output, tmp_path / "single"))
    assert [(r["step"], r["engine"]) for r in ours if r.get("event") == "resumed"] == [(7, legs[1]), (14, legs[2])]
    trained, expected = ([r for r in records if r["kind"] == "train"] for records in (ours, theirs))
    assert [r["step"] for r in trained] == list(range(1, 21))
    assert close(trained, expected)
    final = [
        r["held_out_loss"] for records in (ours, theirs) for r in records if r["kind"] == "evaluation" and r["step"]
    ]
    assert abs(final[0] - final[1]) < 1e-5
    # The position in the data: as many tokens of the very same text.
    states = [json.loads((f / "checkpoints" / "step-00000020" / "state.json").read_text()) for f in
              (output, undisturbed.folder.parent)]  # fmt: skip
    assert states[0]["data"] == states[1]["data"]
    final_here, right = final_weights(output), final_weights(undisturbed.folder.parent)
    assert all(torch.allclose(final_here[key], right[key], atol=2e-4) for key in right)


@pytest.mark.slow
def test_sharded_bf16_attention_only_with_a_teacher_and_recomputed_activations(
    settings: dict[str, Any], teacher_folder: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    settings["objective"] = {"distillation": {"teacher": str(teacher_folder), "cross_entropy_weight": 0.5}}
    settings["train"] |= {"precision": "bf16", "parameters": "attention", "gradient_checkpointing": True}
    one = loop.uptrain(parse_config({**settings, "output": str(tmp_path / "single")}), quiet=True)
    settings["train"]["micro_batch"] = 1
    path = write_config(settings)
    launch_sharded(path, stop=10)
    launch_sharded(path, stop=0)
    actual, expected = (
        [(r["loss"], r["kl"]) for r in read_metrics(Path(folder) / "metrics.jsonl") if r["kind"] == "train"]
        for folder in (settings["output"], tmp_path / "single")
    )
    assert len(actual) == 20
    # bf16 weights in the layers here, bf16 arithmetic on float32 weights there.
    assert torch.tensor(actual).sub(torch.tensor(expected)).abs().max() < 0.02
    ours, theirs, before = (
        final_weights(settings["output"]),
        final_weights(one.folder.parent),
        load_file(Path(settings["model"]) / "model.safetensors"),
    )
    moved = {key for key in before if not torch.equal(before[key], ours[key])}
    assert moved == {key for key in before if "self_attn" in key}
    assert all(torch.allclose(ours[key], theirs[key], atol=0.05) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("legs", [("fsdp2", "single", "ddp"), ("ddp", "fsdp2", "fsdp2")], ids="-".join)
def test_an_average_and_saving_beside_the_training_go_on_with_any_engine(
    settings: dict[str, Any], write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legs: tuple[str, ...]
) -> None:
    settings["train"]["micro_batch"] = 1
    settings["averaging"] = {"decay": 0.9, "every_steps": 2}
    undisturbed = loop.uptrain(parse_config({**settings, "output": str(tmp_path / "single")}), quiet=True)
    settings["checkpoints"] = {"every_steps": 3, "keep": 30, "asynchronous": True}
    path = write_config(settings)
    output = Path(settings["output"])
    for engine, stop in zip(legs, (7, 14, 0), strict=True):
        if engine == "single":
            alone(settings, monkeypatch, stop)
        else:
            launch_sharded(path, stop, engine)
    steps = sorted(int(folder.name[5:]) for folder in (output / "checkpoints").iterdir())
    assert steps == [0, 3, 6, 7, 9, 12, 14, 15, 18, 20]
    assert all(damage(output / "checkpoints" / f"step-{step:08d}") is None for step in steps)
    found, right = final_weights(output), final_weights(undisturbed.folder.parent)
    assert all(torch.allclose(found[key], right[key], atol=2e-4) for key in right)
    ours, theirs = (
        [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
        for folder in (output, tmp_path / "single")
    )
    assert abs(ours["held_out_loss_averaged"] - theirs["held_out_loss_averaged"]) < 1e-5
    assert ours["held_out_loss"] == ours["held_out_loss_averaged"]
