"""Real models, where a shared/ folder of them is at hand: measured here, never needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gqa_convert import convert
from tests.factories import as_bytes, tensors_of
from tests.support import load_with_info

POEMS, STORIES, DOUBLED = "zh-poem-llama-0.75M", "stories260K", "stories260K-mha8"
WINDOW = 128


def load(folder: Path) -> Any:
    """Load with the class a user would take; nothing may be missing, unexpected or of another shape."""
    model, info = load_with_info(folder, dtype=torch.float32)
    faults = {kind: names for kind, names in info.items() if names}
    assert not faults, faults
    return model.eval()


def test_doubled_heads_convert_back_bit_for_bit(shared: Path, tmp_path: Path) -> None:
    out = convert(shared / "models" / DOUBLED, groups=4, out=tmp_path / "out", verify="logits").out
    expected, actual = tensors_of(shared / "models" / STORIES), tensors_of(out)
    assert actual.keys() == expected.keys()
    assert [key for key, x in expected.items() if as_bytes(x) != as_bytes(actual[key])] == []
    load(out)


def test_equal_groups_give_the_source_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / DOUBLED
    out = convert(source, groups=8, out=tmp_path / "out").out
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("method", ["mean", "first", "random"])
@pytest.mark.parametrize("groups", [3, 2, 1])
def test_poems_load_and_generate(groups: int, method: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / POEMS
    out = convert(source, groups=groups, method=method, out=tmp_path / "out", verify="logits").out
    model, tokenizer = load(out), transformers.AutoTokenizer.from_pretrained(out)
    assert model.config.num_key_value_heads == groups
    ids = tokenizer("春", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def held_out(shared: Path) -> torch.Tensor:
    """The validation poems as windows of tokens: each poem with its begin and end, all joined."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models" / POEMS)
    ids: list[int] = []
    for line in (shared / "data" / "zh-poems" / "val.jsonl").read_text("utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"]).input_ids, 2]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def loss(folder: Path, windows: torch.Tensor) -> float:
    """Nats a token over every window's own next tokens."""
    model, total = load(folder), 0.0
    for batch in windows.split(64):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return total / (windows.shape[0] * (WINDOW - 1))


@pytest.mark.slow
def test_what_merging_costs_before_training(shared: Path, tmp_path: Path) -> None:
    source, windows = shared / "models" / POEMS, held_out(shared)
    before = loss(source, windows)
    assert before == pytest.approx(4.402, abs=0.01)
    cost = {}
    for groups in (3, 2, 1):
        for method in ("mean", "first", "random"):
            out = convert(source, groups=groups, method=method, out=tmp_path / f"{method}{groups}").out
            cost[groups, method] = loss(out, windows) - before
    print(f"\n{POEMS}: {before:.3f} nats a token before")
    for (groups, method), more in cost.items():
        print(f"{groups} groups, {method}: +{more:.3f}")
    for groups in (3, 2, 1):
        assert 1.0 < cost[groups, "mean"] < 2.1
        assert cost[groups, "mean"] < cost[groups, "random"] < 3.5
