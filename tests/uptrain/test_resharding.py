"""A checkpoint of one engine resumed by another, and what reading one may not do."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from gqa_convert.errors import CheckpointError
from gqa_convert.uptrain import optim, shards
from gqa_convert.uptrain.config import OptimizerSection
from gqa_convert.uptrain.state import load_training_state, training_state_problem
from gqa_convert.uptrain.whole import load_whole, save_whole


class Scored(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model: Any = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def trained(seed: int = 0, steps: int = 3) -> tuple[Scored, torch.optim.Optimizer]:
    module = Scored(seed)
    optimizer = optim.make_optimizer(module, OptimizerSection())
    optim.set_learning_rate(optimizer, 0.1)
    for _ in range(steps):
        module.model(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def same(one: tuple[nn.Module, torch.optim.Optimizer], two: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True))
    states = [[o.state[p] for g in o.param_groups for p in g["params"]] for _, o in (one, two)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*states, strict=True) for k in a)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    module, optimizer = trained()
    shards.save_shards(tmp_path, module, optimizer)
    return tmp_path


def test_one_process_reads_shards_with_the_optimiser(sharded: Path) -> None:
    fresh = trained(seed=1, steps=0)
    load_training_state(sharded, *fresh)
    same(fresh, trained())
    alone = Scored(2)
    load_training_state(sharded, alone, None)
    assert torch.equal(alone.model[0].weight, fresh[0].model[0].weight)


def test_the_names_of_wrappers_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    module, optimizer = trained()
    save_whole(tmp_path, cast(Any, SimpleNamespace(named_parameters=lambda: [
        ("module." + name.replace("model.", "model._orig_mod."), p) for name, p in module.named_parameters()
    ])), optimizer)  # fmt: skip
    fresh = trained(seed=1, steps=0)
    load_whole(tmp_path, *fresh)
    same(fresh, (module, optimizer))


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


class Attribute:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (Metadata, "__init__")


def replace_bytes(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "shards" / ".metadata"
    path.write_bytes(change(path.read_bytes()))


def outside(data: bytes) -> bytes:
    metadata = pickle.loads(data)
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: pickle.dumps(Harm()), lambda data: pickle.dumps([1]), lambda data: data[:-40], lambda data: b"",
        outside, lambda data: pickle.dumps(os.system), lambda data: b"\x80\x04" + b"(" * 1000,
        lambda data: pickle.dumps(Attribute()),
    ],
    ids=["code", "list", "cut", "empty", "outside", "function", "marks", "attribute"],
)  # fmt: skip
def test_a_description_of_shards_runs_nothing_and_reads_nothing_else(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert training_state_problem(sharded) is None
    replace_bytes(sharded, change)
    assert "cannot be used" in training_state_problem(sharded)
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be used"):
        load_training_state(sharded, *trained(steps=0))
    assert not (tmp_path / "harmed").exists()


def test_a_description_is_read_as_python_3_11_2_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = _MEM_FORMAT_ENCODING
    monkeypatch.setattr(kind, "__reduce_ex__", lambda self, protocol: (getattr, (kind, self.name)))
    module, optimizer = trained()
    shards.save_shards(tmp_path, module, optimizer)
    assert b"getattr" in (tmp_path / "shards" / ".metadata").read_bytes()
    fresh = trained(seed=1, steps=0)
    load_training_state(tmp_path, *fresh)
    same(fresh, (module, optimizer))


def test_plain_values_among_shards_are_unpickled_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, optimizer = trained()
    optimizer.param_groups[0]["eps"] = Harm()
    shards.save_shards(tmp_path, module, optimizer)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_training_state(tmp_path, *trained(steps=0))
    assert not (tmp_path / "harmed").exists()


def test_shards_of_another_model_are_refused(sharded: Path) -> None:
    other = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(CheckpointError, match="shards cannot be read"):
        load_training_state(sharded, other, torch.optim.AdamW(other.parameters()))


def test_an_optimisers_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    module, optimizer = trained()
    save_whole(tmp_path, module, optimizer)
    state = torch.load(tmp_path / "optimizer.pt")
    state["state"][0]["exp_avg"] = torch.zeros(5, 5)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="exp_avg of parameter 0 has shape"):
        load_whole(tmp_path, *trained(steps=0))
    state["state"][99] = state["state"].pop(0)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="another optimiser"):
        load_whole(tmp_path, *trained(steps=0))
