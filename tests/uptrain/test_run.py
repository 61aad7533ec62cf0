import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gqa_convert.errors import OutputError, Preempted, TrainingAborted, UsageError
from gqa_convert.uptrain import loop, saving
from gqa_convert.uptrain.checkpoints import CheckpointStore
from gqa_convert.uptrain.loop import UptrainResult
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import parse_config
from gqa_convert.uptrain.state import save_training_state
from gqa_convert.uptrain.step import train_step as real_step
from tests.support import load_with_info
from tests.uptrain.conftest import make_tiny


def run(settings: dict[str, Any], **changes: Any) -> UptrainResult:
    merged = {**settings, **{key: {**settings.get(key, {}), **value} for key, value in changes.items()}}
    return loop.uptrain(parse_config(merged), quiet=True)


def trained(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "final" / "model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(folder: Path | str) -> dict[int, tuple[float, float, float]]:
    records = read_metrics(Path(folder) / "metrics.jsonl")
    return {r["step"]: (r["loss"], r["lr"], r["grad_norm"]) for r in records if r["kind"] == "train"}


@pytest.fixture
def straight(settings: dict[str, Any], tmp_path: Path) -> tuple[UptrainResult, Path]:
    settings["output"] = str(tmp_path / "straight")
    result = run(settings)
    settings["output"] = str(tmp_path / "run")
    return result, tmp_path / "straight"


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    real = real_step

    def train_step(parts: Any, guards: Any, at: int, **rest: Any) -> Any:
        result = real(parts, guards, at, **rest)
        if at + 1 == step - 1:  # arrives before the last step, takes effect after it
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(loop, "train_step", train_step)


def check_resumed(settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `settings` came to is what they come to in `folder` after a stop at step 9, bit for bit."""
    resumed = {**settings, "output": str(folder)}
    stop_after(monkeypatch, 9)
    with pytest.raises(Preempted):
        run(resumed)
    monkeypatch.undo()
    run(resumed)
    assert same_bits(trained(settings["output"]), trained(folder))
    assert losses(settings["output"]) == losses(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
def test_stopped_by_a_signal_and_resumed_is_bitwise_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, dropout: float
) -> None:
    settings["data"]["streaming"] = streaming
    settings["train"]["dropout"] = dropout
    run(settings)
    resumed = {**settings, "output": str(tmp_path / "resumed")}
    stop_after(monkeypatch, 10)
    with pytest.raises(Preempted) as caught:
        run(resumed)
    assert caught.value.exit_code == 75
    assert CheckpointStore(tmp_path / "resumed" / "checkpoints", 2).steps() == [0, 10]
    monkeypatch.undo()
    result = run(resumed)
    assert result.steps == 20
    assert same_bits(trained(settings["output"]), trained(resumed["output"]))
    assert losses(settings["output"]) == losses(resumed["output"])
    for name in ("model.safetensors", "optimizer.pt"):
        one, two = (Path(s["output"]) / "checkpoints/step-00000020" / name for s in (settings, resumed))
        assert one.read_bytes() == two.read_bytes()


KILLER = """
import os, signal, sys
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.read_config import load_config
real = loop.train_step
def train_step(parts, guards, at, **rest):
    if at == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(parts, guards, at, **rest)
loop.train_step = train_step
loop.uptrain(load_config(__import__("pathlib").Path(sys.argv[1])))
"""


def test_killed_and_resumed_from_the_last_checkpoint_is_bitwise_the_same(
    settings: dict[str, Any], straight: tuple[UptrainResult, Path], write_config: Callable[..., Path]
) -> None:
    settings["checkpoints"] = {"every_steps": 5}
    done = subprocess.run([sys.executable, "-c", KILLER, write_config(settings)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert max(losses(settings["output"])) == 13
    result = run(settings)
    assert result.loss_after == straight[0].loss_after
    assert same_bits(trained(settings["output"]), trained(straight[1]))
    assert losses(settings["output"]) == losses(straight[1])


def test_the_result_is_a_plain_model_that_learnt_and_keeps_what_came_along(
    settings: dict[str, Any], tiny_folder: Path
) -> None:
    result = run(settings)
    assert result.loss_after < result.loss_before - 0.5
    _, info = load_with_info(result.folder)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not same_bits(load_file(tiny_folder / "model.safetensors"), trained(settings["output"]))
    config = json.loads((result.folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (result.folder / "NOTICE.txt").read_text() == "kept"
    assert AutoTokenizer.from_pretrained(result.folder)("cat")["input_ids"]
    story = json.loads((result.folder / "gqa_convert.json").read_text())
    assert story["conversion"] == {"method": "mean"}
    assert story["uptraining"]["tokens"] == 20 * 4 * 32
    assert story["uptraining"]["held_out_loss"]["after"] == result.loss_after
    assert str(tiny_folder.parent) not in json.dumps(story)
    # What the file computes is what the run measured: score it again from disk.
    assert run({**settings, "model": str(result.folder), "output": settings["output"] + "-again"},
               budget={"steps": 1}).loss_before == pytest.approx(result.loss_after, abs=1e-6)  # fmt: skip


@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_changes_nothing(
    settings: dict[str, Any], straight: tuple[UptrainResult, Path], micro: int
) -> None:
    run(settings, train={"micro_batch": micro})
    for step, values in losses(settings["output"]).items():
        assert values == pytest.approx(losses(straight[1])[step], rel=2e-5)


def test_a_finished_run_is_not_run_again(settings: dict[str, Any], straight: tuple[UptrainResult, Path]) -> None:
    settings["output"] = str(straight[1])
    before = (straight[1] / "metrics.jsonl").read_text().count('"train"')
    assert run(settings).loss_after == straight[0].loss_after
    assert (straight[1] / "metrics.jsonl").read_text().count('"train"') == before


def test_a_run_goes_on_longer_when_its_budget_grows(
    settings: dict[str, Any], straight: tuple[UptrainResult, Path]
) -> None:
    settings["output"] = str(straight[1])
    assert run(settings, budget={"steps": 25}).steps == 25


def test_resuming_with_other_data_is_refused(settings: dict[str, Any], straight: tuple[UptrainResult, Path]) -> None:
    settings["output"] = str(straight[1])
    with pytest.raises(UsageError, match="seed was 0 and is 1"):
        run(settings, train={"seed": 1})
    with pytest.raises(UsageError, match="resume=auto"):
        run(settings, checkpoints={"resume": "never"})


def test_resuming_with_another_model_of_the_same_shape_is_refused(
    settings: dict[str, Any], straight: tuple[UptrainResult, Path], tmp_path: Path
) -> None:
    settings["output"] = str(straight[1])
    settings["model"] = str(make_tiny(tmp_path / "again", seed=7))
    with pytest.raises(UsageError, match=r"model_weights was .* and is"):
        run(settings, budget={"steps": 25})


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_resuming_with_other_text_under_the_same_name_is_refused(
    settings: dict[str, Any], tmp_path: Path, streaming: bool
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(Path(settings["data"]["source"]["paths"][0]).read_bytes())
    data = {"source": {"kind": "folder", "paths": [str(folder)]}, "streaming": streaming}
    run(settings, data=data, budget={"steps": 2})
    (folder / "b.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    with pytest.raises(UsageError, match=r"data: the (text|corpus).* had .* when the checkpoint was written"):
        run(settings, data=data, budget={"steps": 4})


@pytest.mark.parametrize(
    "distillation",
    [
        {},
        {"cross_entropy_weight": 0.5, "temperature": 2.0, "dtype": "float32"},
        {"top_k": 4},
        {"hidden_weight": 1.0},
    ],
    ids=["kl", "with-ce", "top-k", "hidden"],
)
def test_distillation_brings_the_model_to_its_teacher(
    settings: dict[str, Any], teacher_folder: Path, distillation: dict[str, Any]
) -> None:
    settings["objective"] = {"distillation": {"teacher": str(teacher_folder), **distillation}}
    result = run(settings)
    divergences = [
        r["held_out_kl"] for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if "held_out_kl" in r
    ]
    if not distillation or "hidden_weight" in distillation:
        assert divergences[-1] < 0.9 * divergences[0]
    assert result.reference_loss is not None


def test_a_teacher_with_another_vocabulary_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    ).save_pretrained(tmp_path / "other")
    settings["objective"] = {"distillation": {"teacher": str(tmp_path / "other")}}
    with pytest.raises(UsageError, match="vocabulary"):
        run(settings)


def test_attention_only_moves_nothing_else(settings: dict[str, Any], tiny_folder: Path) -> None:
    run(settings, train={"parameters": "attention"})
    before, after = load_file(tiny_folder / "model.safetensors"), trained(settings["output"])
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "self_attn" in key}
    saved = load_file(Path(settings["output"]) / "checkpoints/step-00000020/model.safetensors")
    assert len(saved) == 8


def test_lora_is_merged_into_a_plain_model(
    settings: dict[str, Any], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    changes = {"train": {"parameters": "lora", "lora": {"rank": 4}}}
    stop_after(monkeypatch, 10)
    with pytest.raises(Preempted):
        run(settings, **changes)
    monkeypatch.undo()
    result = run(settings, **changes)
    before, after = load_file(tiny_folder / "model.safetensors"), trained(settings["output"])
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        k for k in before if "self_attn" in k
    }
    _, info = load_with_info(result.folder)
    assert not info["unexpected_keys"]
    assert result.loss_after < result.loss_before
    again = run({**settings, "model": str(result.folder), "output": settings["output"] + "-again"}, budget={"steps": 1})
    assert again.loss_before == pytest.approx(result.loss_after, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"precision": "bf16"}},
        {"train": {"precision": "pure_bf16"}},
        {"train": {"gradient_checkpointing": True, "deterministic": True}},
        {"optimizer": {"kind": "adafactor"}, "schedule": {"kind": "constant", "peak": 0.05}},
        {"optimizer": {"kind": "muon"}},
        {"data": {"separate_documents": False, "shuffle": False}},
        {"log": {"trackers": ["tensorboard"], "profile": True}, "evaluation": {"every_tokens": 640}},
        {"train": {"attention": "eager"}, "evaluation": {"reference": "TEACHER"}},
    ],
    ids=["bf16", "pure-bf16", "checkpointing", "adafactor", "muon", "packed", "seeing", "reference"],
)
def test_every_switch_trains(settings: dict[str, Any], teacher_folder: Path, changes: dict[str, Any]) -> None:
    changes = json.loads(json.dumps(changes).replace("TEACHER", str(teacher_folder)))
    result = run(settings, **changes)
    torch.use_deterministic_algorithms(False)
    assert result.loss_after < result.loss_before
    output = Path(settings["output"])
    if "log" in changes:
        assert (output / "profile" / "trace-0.json").stat().st_size > 1000
        assert list((output / "trackers").rglob("events.out.*"))
        kinds = [r["step"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "evaluation"]
        assert kinds == [0, 5, 10, 15, 20]
    if "evaluation" in changes and "reference" in changes["evaluation"]:
        assert result.reference_loss > 0


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one_does_and_resumes(
    settings: dict[str, Any], straight: tuple[UptrainResult, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["train"]["compile"] = True
    stop_after(monkeypatch, 10)
    with pytest.raises(Preempted):
        run(settings)
    monkeypatch.undo()
    result = run(settings)
    actual, expected = losses(settings["output"]), losses(straight[1])
    assert len(actual) == 20
    assert all(abs(actual[step][0] - expected[step][0]) < 1e-4 for step in expected)
    _, info = load_with_info(result.folder)
    assert not any(info.values())


def test_evaluations_at_given_tokens_come_beside_the_regular_ones(settings: dict[str, Any]) -> None:
    # A step is 128 tokens; 300 is passed in the third one, and the last step is always evaluated, once.
    run(settings, evaluation={"every_tokens": 1280, "at_tokens": [128, 300, 2560]})
    records = read_metrics(Path(settings["output"]) / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 1, 3, 10, 20]


def test_a_nan_stops_before_the_step_and_the_checkpoint_is_from_before(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = real_step

    def poison(parts: Any, guards: Any, at: int, **rest: Any) -> Any:
        if at == 7:
            parts.trained[0].data.fill_(float("nan"))
        return real(parts, guards, at, **rest)

    monkeypatch.setattr(loop, "train_step", poison)
    with pytest.raises(TrainingAborted, match="step 8"):
        run(settings, checkpoints={"every_steps": 5})
    store = CheckpointStore(Path(settings["output"]) / "checkpoints", 2)
    assert store.steps() == [0, 5]
    monkeypatch.undo()
    assert run(settings).steps == 20


def test_a_full_disk_is_survived_and_then_stops_clean(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = save_training_state

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if 2 <= len(calls) <= 3:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(saving, "save_training_state", full)
    assert run(settings, checkpoints={"every_steps": 5}).steps == 20
    events = [r for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if r["kind"] == "event"]
    assert [r["step"] for r in events if r["event"] == "save failed"] == [5, 10]
    calls.clear()
    with pytest.raises(OutputError, match="disk is full"):
        run({**settings, "output": settings["output"] + "2"}, checkpoints={"every_steps": 2, "failures_allowed": 1})
    store = CheckpointStore(Path(settings["output"] + "2") / "checkpoints", 2)
    assert store.newest().step == 0


def test_what_a_killed_run_was_saving_does_not_stay(settings: dict[str, Any]) -> None:
    left = Path(settings["output"]) / "checkpoints" / ".saving-00000007"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    run(settings, budget={"steps": 1})
    assert not left.exists()


def test_two_runs_in_one_folder_are_refused(settings: dict[str, Any]) -> None:
    import fcntl

    Path(settings["output"]).mkdir()
    handle = os.open(Path(settings["output"]) / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another run"):
        run(settings)
    os.close(handle)


def test_asking_for_what_is_not_there_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"engine fsdp2 was asked for, single.*2 processes were asked for, 1"):
        run(settings, expect={"engine": "fsdp2", "processes": 2})


def test_held_out_text_of_its_own_and_a_python_source(settings: dict[str, Any], text_file: Path) -> None:
    own = {"kind": "jsonl", "paths": [str(text_file)]}
    result = run(settings, data={"held_out_source": own, "held_out_fraction": 0.0}, evaluation={"tokens": 500})
    first = read_metrics(Path(settings["output"]) / "metrics.jsonl")[0]
    assert 300 < first["held_out_tokens"] <= 512
    assert result.loss_after < result.loss_before
