"""The count of a run's memory: against what autograd keeps, and how it depends on engine and devices."""

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gqa_convert.budget.memory import LOGIT_BYTES, TrainingSetup, chunk_positions, training_memory
from gqa_convert.budget.shape import ModelShape, known_model
from gqa_convert.errors import UsageError
from gqa_convert.uptrain.model import ScoredModel
from gqa_convert.uptrain.objective import LossSpec
from tests.support import Command

SETTINGS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SETTINGS))


@pytest.fixture(scope="module")
def shape(model: Any) -> ModelShape:
    total = sum(p.numel() for p in model.parameters())
    return ModelShape(
        name="tiny", parameters=total, matmul_parameters=total - 512 * 64, layers=4, attention_width=64, context=128,
        hidden_size=64, vocab_size=512, kv_width=32,
    )  # fmt: skip


def kept(model: Any, parameters: str, context: int, micro: int) -> int:
    """Bytes that the graph of a loss keeps, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer not in own:
            storages[pointer] = x.untyped_storage().nbytes()
        return x

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameters == "all" or ".self_attn." in name)
    scored = ScoredModel(model, LossSpec(chunk=64)).train()
    ids = torch.randint(3, 500, (micro, context))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scored({"input_ids": ids}, ids.roll(-1, 1))[0].detach()
    return sum(storages.values())


@pytest.mark.parametrize("parameters", ["all", "attention"])
def test_activations_are_what_autograd_keeps(model: Any, shape: ModelShape, parameters: str) -> None:
    setup = TrainingSetup(context=128, micro_batch=4, precision="float32", parameters=parameters)
    counted = training_memory(shape, setup)
    by_loss = 4 * 128 * 64 * 4 + (512 * 64 * 4 if parameters == "all" else 0)
    measured = kept(model, parameters, 128, 4)
    assert counted.activations + by_loss == pytest.approx(measured, rel=0.2)


def test_what_is_sharded_is_a_share_and_what_is_not_is_whole() -> None:
    shape = known_model("llama-2-7b").shape
    one, eight = (
        training_memory(shape, TrainingSetup(engine="fsdp2", devices=n, checkpointing=True), shape) for n in (1, 8)
    )
    assert eight.weights * 8 == pytest.approx(one.weights, rel=1e-6)
    assert eight.optimizer * 8 == pytest.approx(one.optimizer, rel=1e-6)
    assert eight.activations == one.activations
    ddp = training_memory(shape, TrainingSetup(engine="ddp", devices=8), shape)
    assert ddp.weights == 4 * shape.parameters
    assert ddp.peak > 5 * eight.peak
    step = training_memory(shape, TrainingSetup(engine="fsdp2", devices=8, step_sync=True))
    assert step.gradients > 4 * shape.parameters


def test_chunks_of_the_loss_have_so_many_bytes() -> None:
    for vocabulary in (50, 32_000, 49_152, 128_256, 262_144):
        assert chunk_positions(vocabulary) * vocabulary * 4 <= LOGIT_BYTES
    assert chunk_positions(32_000) == 1024
    assert 200 < chunk_positions(128_256) < 300


def test_the_command_counts_every_engine_beside_the_device(command: Command) -> None:
    done = command("gqa", "budget", "llama-2-13b", "--alpha", 0.01, "--distill", "--engine", "all", "--json")
    counted = {memory["engine"]: memory for memory in json.loads(done.out)["memory"]}
    assert list(counted) == ["single", "ddp", "fsdp2", "deepspeed"]
    assert counted["fsdp2"]["peak"] < 80e9 < counted["ddp"]["peak"]
    assert "TOO MUCH" in command("gqa", "budget", "llama-65b", "--alpha", 0.01).out
    assert command("gqa", "budget", "llama-65b", "--alpha", 0.01, "--engine", "zero9").code == 2


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="engine 'x'"):
        TrainingSetup(engine="x")
    with pytest.raises(UsageError, match="precision 'fp8'"):
        TrainingSetup(precision="fp8")
    bare = ModelShape(name="m", parameters=1, matmul_parameters=1, layers=1, attention_width=1, context=1)
    with pytest.raises(UsageError, match="width or vocabulary"):
        training_memory(bare, TrainingSetup())
