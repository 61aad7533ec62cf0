"""What a run may use that is not always there: fused kernels, task scores, the hub. Each is asked for at the start."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gqa_convert.errors import HubError, UsageError
from gqa_convert.uptrain import fused, loop
from gqa_convert.uptrain.config import TrainSection
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.model import Teacher
from gqa_convert.uptrain.read_config import parse_config
from tests.uptrain.test_run import run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def section(**values: Any) -> Any:
    return TrainSection(batch_sequences=1, **values)


def nothing_was_trained(settings: dict[str, Any]) -> bool:
    return not (Path(settings["output"]) / "checkpoints").exists()


def test_liger_is_refused_or_left_out_where_it_does_not_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["train"]["liger"] = True
    with pytest.raises(UsageError, match=r"train\.liger=true: liger-kernel is not installed"):
        run(settings)
    assert nothing_was_trained(settings)
    said: list[str] = []
    assert fused.uses_liger(section(liger="auto"), GPU, said.append) is False
    assert "not installed" in said[0]
    monkeypatch.setattr(fused, "find_spec", lambda _: object())
    assert fused.uses_liger(section(liger="auto"), GPU, said.append) is True
    assert fused.uses_liger(section(liger=False), GPU, said.append) is False
    with pytest.raises(UsageError, match="run on GPUs"):
        fused.uses_liger(section(liger=True), CPU, said.append)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for liger-kernel: knows llama, and lets each norm's output be multiplied by `factor`."""
    stub: SimpleNamespace = SimpleNamespace(factor=1.0, given=None)

    def apply(model: Any, **settings: dict[str, Any]) -> Any:
        stub.given = settings
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda *args: args[-1] * stub.factor)

    package: Any
    patches: Any
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = apply
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    for module in (ModuleType("liger_kernel"), package, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    return stub


def small() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                    max_position_embeddings=32)
    )  # fmt: skip


def test_ligers_kernels_are_tried_on_the_model(liger: Any) -> None:
    assert fused.put_liger_in(small(), wanted=True)
    assert liger.given == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    liger.factor = 3.0
    with pytest.raises(UsageError, match="change by"):
        fused.put_liger_in(small(), wanted=False)
    other = small()
    other.config.model_type = "of another kind"
    assert fused.put_liger_in(other, wanted=False) is False
    with pytest.raises(UsageError, match="no kernels for of another kind"):
        fused.put_liger_in(other, wanted=True)


def test_automatic_attention_is_flash_only_where_that_runs(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = section(attention="auto")
    model = SimpleNamespace(_supports_flash_attn=True, _supports_sdpa=True)
    assert fused.chosen_attention(auto, model, GPU) == "sdpa"
    monkeypatch.setattr(fused, "_flash_is_there", lambda: True)
    assert fused.chosen_attention(auto, model, GPU) == "flash_attention_2"
    assert fused.chosen_attention(auto, model, CPU) == "sdpa"
    assert fused.chosen_attention(section(attention="auto", precision="float32"), model, GPU) == "sdpa"
    assert fused.chosen_attention(auto, SimpleNamespace(_supports_sdpa=False), GPU) == "eager"
    assert fused.chosen_attention(section(attention="flex_attention"), model, GPU) == "flex_attention"
    settings["train"]["attention"] = "auto"
    assert run(settings, budget={"steps": 1}).steps == 1


def test_the_teacher_is_compiled_if_that_is_asked_for(
    settings: dict[str, Any], teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    told = {"teacher": str(teacher_folder), "dtype": "float32"}
    teachers: list[Any] = []
    real = Teacher.__init__

    def init(self: Any, model: Any, **rest: Any) -> Any:
        teachers.append(model)
        real(self, model, **rest)

    monkeypatch.setattr(Teacher, "__init__", init)
    run(settings, budget={"steps": 1}, objective={"distillation": {**told, "compile": True}})
    assert compiled == teachers


class Manager:
    all_tasks = ("reading",)

    def __init__(self, include_path: Any = None) -> None:
        pass


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for lm-evaluation-harness: the score is the mean of the model's last norm."""
    seen: list[Any] = []

    def simple_evaluate(*, model: Any, tasks: Any, limit: Any, **_: object) -> Any:
        seen.append((model.training, limit))
        return {"results": {task: {"acc,none": float(model.model.norm.weight.detach().mean())} for task in tasks}}

    package: Any
    tasks: Any
    huggingface: Any
    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    models, huggingface = ModuleType("lm_eval.models"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate, tasks.TaskManager = simple_evaluate, Manager
    huggingface.HFLM = lambda pretrained, **_: pretrained
    for module in (package, tasks, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_tasks_are_scored_while_a_model_is_trained(settings: dict[str, Any], lm_eval: list[Any]) -> None:
    settings["evaluation"] = {"tasks": ["reading"], "tasks_every_tokens": 5 * 4 * 32, "tasks_limit": 7}
    run(settings, averaging={"decay": 0.5})
    records = [r for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if r["kind"] == "tasks"]
    assert [r["step"] for r in records] == [0, 5, 10, 15, 20]
    assert len({r["reading/acc"] for r in records}) == 5
    assert lm_eval == [(False, 7)] * 5
    run(settings, averaging={"decay": 0.5})  # nothing is left to train: the last score is made again, and there once
    again = [r for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if r["kind"] == "tasks"]
    assert again == records


def test_tasks_that_cannot_be_scored_are_refused_before_training(
    settings: dict[str, Any], lm_eval: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["evaluation"] = {"tasks": ["writing"]}
    with pytest.raises(UsageError, match=r"evaluation\.tasks writing: lm-eval knows no such task"):
        run(settings)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"evaluation\.tasks runs lm-evaluation-harness: pip install"):
        run(settings)
    assert nothing_was_trained(settings)


class Hub:
    """Stands in for the hub's client; remembers what it was sent."""

    sent: ClassVar[list[Any]] = []
    knows = True

    def whoami(self) -> Any:
        if not self.knows:
            raise OSError("401: invalid token")

    def create_repo(self, repo: Any, *, private: Any, exist_ok: Any) -> Any:
        self.sent.append((repo, private, exist_ok))

    def upload_folder(self, *, repo_id: Any, folder_path: Any, commit_message: Any) -> Any:
        self.sent.append((repo_id, sorted(path.name for path in folder_path.iterdir()), commit_message))
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr(Hub, "sent", [])
    return Hub


def test_the_result_is_sent_to_the_hub_with_its_card(settings: dict[str, Any], hub: Any) -> None:
    run({**settings, "push": "me/model"}, budget={"steps": 1})
    made, sent = hub.sent
    assert made == ("me/model", True, True)
    assert {"README.md", "config.json", "model.safetensors"} <= set(sent[1])
    assert "push" not in (Path(settings["output"]) / "final" / "gqa_convert.json").read_text()


def test_what_cannot_be_sent_is_said_before_training(
    settings: dict[str, Any], hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["push"] = "me/model"
    monkeypatch.setattr(hub, "knows", False)
    with pytest.raises(HubError, match="Is the token right"):
        run(settings)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="Set HF_TOKEN"):
        run(settings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        run(settings)
    assert nothing_was_trained(settings)
    assert hub.sent == []
    with pytest.raises(UsageError, match="push"):
        parse_config({**settings, "push": "no-owner"})


def test_a_refusing_hub_leaves_the_result_where_it_is(
    settings: dict[str, Any], hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload_folder(self: Any, **_: Any) -> Any:
        raise OSError("quota")

    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    with pytest.raises(HubError, match="could not be uploaded"):
        run({**settings, "push": "me/model"}, budget={"steps": 1})
    assert (Path(settings["output"]) / "final" / "model.safetensors").is_file()
    monkeypatch.undo()
    assert loop.uptrain(parse_config({**settings, "budget": {"steps": 1}}), quiet=True).steps == 1
