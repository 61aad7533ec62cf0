"""The contract on a spread of families, and all of them under the `slow` mark.

tied heads exact; groups = heads identical; other tensors identical; cached decode equals full forward; reload clean
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert.anatomy.families import families
from gqa_convert.anatomy.family_facts import refused_families
from gqa_convert.contract.native import prove
from gqa_convert.contract.run import run_all
from gqa_convert.conversion import execute
from gqa_convert.heads import Grouping

# One of each way in which families lay out keys and values, configs and checkpoint keys.
SPREAD = {
    "llama": {},  # separate projections
    "llama+bias": {"attention_bias": True},
    "qwen2": {},  # biases by default
    "qwen3": {},  # key norm over head_dim, shared by the heads: stays
    "olmo2": {},  # key norm over the full width
    "cohere+qk_norm": {"use_qk_norm": True},  # key norm of (KV heads, head_dim)
    "stablelm+qk_norm": {"qk_layernorm": True},  # one key norm a head: keys that vanish
    "phi3": {},  # fused q, k and v
    "dbrx": {},  # fused, the field nested with a copy at the top
    "gpt_bigcode": {},  # fused and all heads or one, another order of rows for each
    "falcon": {},
    "gemma3": {},  # hub keys that differ from module names
    "cosmos3_omni": {},
    "cohere_asr": {},
    "molmo2": {},  # fused on the hub, separate in the model
    "t5gemma": {},  # sequence to sequence
    "dia": {},  # cross-attention with a field of its own
    "jamba": {},  # attention on some layers only
    "nemotron_h": {},
    "recurrent_gemma": {},
    "zamba2": {},  # one attention block tied across layers
    "mimo_v2_flash": {},  # keys wider than values, twice the heads on sliding layers
    "gemma4_text": {},  # head_dim differs by layer
    "inkling2_text": {},  # convolutions over keys and values
    "mixtral": {},  # experts that loading stacks
    "gpt_neox": {},  # written as another family, as are the others below
    "gptj": {},
    "codegen": {},
    "gpt2": {},
    "opt": {},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SPREAD)
def test_the_contract_holds(name: str, tmp_path: Path) -> None:
    record = prove(name.split("+")[0], tmp_path, changes=SPREAD[name])
    assert record.proven, record.reason


@pytest.mark.parametrize("model_type", ["led", "deepseek_v3", "mamba", "zaya"])
def test_other_families_are_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    record = prove(model_type, tmp_path)
    assert record.refused
    assert record.checks.get("refused_with_reason")
    assert record.reason == refused_families()[model_type][1]


def test_a_converter_that_pools_strided_heads_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_convert.heads import Grouping

    def strided(num_heads: int, num_groups: int) -> Grouping:
        return Grouping(tuple(tuple(range(g, num_heads, num_groups)) for g in range(num_groups)))

    monkeypatch.setattr(Grouping, "contiguous", staticmethod(strided))
    record = prove("llama", tmp_path)
    assert not record.proven
    assert record.reason.startswith("tied_heads_exact: model.layers.0.self_attn.k_proj.weight")


def test_a_converter_that_leaves_the_config_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = execute.convert

    def forgetful(source: Path, *, groups: int, out: Path) -> Any:
        result = original(source, groups=groups, out=out)
        (out / "config.json").write_bytes((source / "config.json").read_bytes())
        return result

    monkeypatch.setattr(execute, "convert", forgetful)
    record = prove("llama", tmp_path)
    assert record.reason == "config_same: num_key_value_heads (1 in all)"


@pytest.mark.parametrize("which", ["per_head", "fold_scale", "halves_first"])
def test_a_rule_that_misplaces_rows_or_scales_is_caught(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gqa_convert.modeling.transpile.rules import gpt_neox_parallel, gptj

    family, module = ("gptj", gptj) if which == "halves_first" else ("gpt_neox", gpt_neox_parallel)
    wrong = {
        "per_head": lambda x, heads, part: x.chunk(3)[part],
        "fold_scale": lambda weight, scale: weight,
        "halves_first": lambda x, heads, rotary: x,
    }
    monkeypatch.setattr(module, which, wrong[which])
    record = prove(family, tmp_path)
    assert not record.proven
    assert record.reason.startswith("groups_equal_heads_same_logits: differs by")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "statuses", "least"),
    [("AB", ["proven"], 185), ("C", ["proven"], 45), ("CDN", ["refused", "nested"], 55)],
    ids=["with_a_setting", "without_a_setting", "refused"],
)
def test_the_contract_holds_for_every_family_on_record(kinds: str, statuses: list[str], least: int) -> None:
    """`pytest -m slow tests/contract -k without_a_setting` is the run of the families without a KV-head setting."""
    names = [family.model_type for family in families() if family.kind in kinds and family.status in statuses]
    assert len(names) >= least
    records = run_all(names, jobs=2, timeout=240)
    held = [record.model_type for record in records if (record.proven if "proven" in statuses else record.refused)]
    assert {record.model_type: record.reason for record in records if record.model_type not in held} == {}
