"""Families whose attention knows no groups: the cache shrinks, decoding gets no faster, and a flag must ask for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gqa_convert import convert, plan
from gqa_convert.anatomy.families import families
from gqa_convert.contract.native import prove
from gqa_convert.contract.run import run_all
from gqa_convert.conversion.inspect import inspect, verify_pair
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.modeling import shipping
from gqa_convert.tiny.forward import cache_head_counts, difference
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config
from tests.modeling.conftest import Make
from tests.support import Command


@pytest.mark.parametrize("model_type", sorted(shipping.SLOW))
def test_the_contract_holds(model_type: str, tmp_path: Path) -> None:
    record = prove(model_type, tmp_path)
    assert record.proven, record.reason
    assert record.checks["cache_holds_groups"]


def test_strangers_load_them() -> None:
    assert [record.reason for record in run_all(["bloom", "mpt"], jobs=1)] == ["", ""]


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "mpt", "xglm"])
def test_generation_is_the_same_however_it_is_cached(make: Make, name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(make(name, 2)).eval()
    inputs = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))

    def text(**choices: Any) -> list[list[int]]:
        tokens = model.generate(inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **choices)
        ids: list[list[int]] = tokens.tolist()
        return ids

    assert text() == text(use_cache=False)
    assert text(num_beams=3) == text(num_beams=3, use_cache=False)


@pytest.mark.parametrize("groups", [1, 2])
def test_cross_attention_reads_copies_of_what_it_stored(tmp_path: Path, groups: int) -> None:
    config = tiny_config("rembert", changes={"add_cross_attention": True})
    config.add_cross_attention = True
    tiny_model(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", groups=groups, out=tmp_path / "out", allow_slow=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    heard = torch.randn(2, 5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(input_ids=ids, encoder_hidden_states=heard, use_cache=False).logits
        cache, pieces = None, []
        for piece in ids.split([5, 1, 1, 1, 1], dim=1):
            output = model(input_ids=piece, encoder_hidden_states=heard, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert difference(full, torch.cat(pieces, dim=1)) < 1e-4
    assert set(cache_head_counts(cache)) == {groups}
    assert len(cache_head_counts(cache)) == 2 * config.num_hidden_layers


def test_the_plan_says_that_nothing_gets_faster(make: Make) -> None:
    planned = plan(make("bloom"), groups=2, allow_slow=True)
    assert planned.kv_cache_bytes_per_token_before == 4 * planned.kv_cache_bytes_per_token_after
    assert any("decoding is no faster" in note for note in planned.notes)
    assert not any("no faster" in note for note in plan(make("opt"), groups=2).notes)


def test_without_the_flag_they_are_refused_by_it(make: Make, command: Command, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"bloom: .*no faster.*--allow-slow"):
        plan(make("bloom"), groups=2)
    plan(make("bloom"), groups=8)  # nothing changes, so nothing is slower than it could be
    refused = command("gqa-convert", "--groups", "2", str(make("mpt")), "--out", str(tmp_path / "out"))
    assert (refused.code, refused.err.count("\n")) == (5, 1)
    assert "--allow-slow" in refused.err
    assert not (tmp_path / "out").exists()
    done = command("gqa-convert", "--groups", "2", "--allow-slow", str(make("mpt")), "--out", str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gqa_mpt"
    assert verify_pair(make("mpt"), tmp_path / "out", logits=True)["differing"] == []


def test_inspecting_and_listing_say_so(make: Make) -> None:
    inspected = inspect(make("gpt_neo"))
    assert inspected.slow
    assert inspected.legal_groups == (1, 2, 4, 8)
    assert not inspect(make("opt")).slow
    slow = {family.model_type for family in families() if "--allow-slow" in family.reason}
    assert slow == shipping.SLOW
