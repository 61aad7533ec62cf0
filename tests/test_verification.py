"""Verification finds what is wrong, at the level that promises to, and says so in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert import convert, plan
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.conversion.verify import verify_output
from gqa_convert.errors import VerificationError
from gqa_convert.heads import Grouping, merge_heads, split_heads
from gqa_convert.merge import registry
from tests import factories
from tests.factories import FAMILIES
from tests.support import Command

K = "model.layers.1.self_attn.k_proj.weight"


def use_for_mean(pool: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `--method mean` do something else."""
    method = registry.get_method("mean")
    broken = type(method)(**{**vars(method), "pool": pool})
    monkeypatch.setitem(registry._METHODS, "mean", broken)


def strided(x: torch.Tensor, grouping: Grouping, dim: int, **_: Any) -> torch.Tensor:
    """The classic fault: group g gets heads g, g + G, g + 2G ... instead of adjacent ones."""
    heads = split_heads(x, grouping.num_heads, dim)
    return merge_heads(heads.unflatten(dim, (grouping.group_size, grouping.num_groups)).mean(dim), dim)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_agree_for_a_right_conversion(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", family, dtype=dtype)
    checks = convert(source, groups=FAMILIES[family].groups[0], verify="logits").checks
    assert 0 <= checks["logit_difference"] <= 1e-4 * checks["logit_scale"]
    assert checks["logit_scale"] > 0.01


@pytest.mark.parametrize("method", ["first", "random"])
def test_logits_agree_for_other_methods(method: str, tmp_path: Path) -> None:
    checks = convert(factories.make(tmp_path / "source"), groups=2, method=method, verify="logits").checks
    assert checks["logit_difference"] <= 1e-4 * checks["logit_scale"]


@pytest.mark.parametrize("family", ["llama", "olmo2", "stablelm", "phi3", "llava"])
def test_logits_catch_strided_groups(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = factories.make(tmp_path / "source", family, dtype=torch.bfloat16)
    use_for_mean(strided, monkeypatch)
    with pytest.raises(VerificationError, match="means of adjacent heads"):
        convert(source, groups=4, verify="logits")
    assert not (tmp_path / "source-gqa4").exists()


def test_strided_groups_are_not_exact_for_tied_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of the guard: the tied-heads tests of test_conversion.py would see the fault too."""
    reference = factories.make(tmp_path / "reference", kv_heads=4)
    source = factories.make_tied(tmp_path / "source", reference, "llama", 4)
    use_for_mean(strided, monkeypatch)
    merged = factories.tensors_of(convert(source, groups=4).out)[K]
    assert (merged - factories.tensors_of(reference)[K]).abs().max() > 0.1


def test_structure_catches_a_method_that_gives_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = factories.make(tmp_path / "source")
    use_for_mean(lambda x, grouping, dim, **_: x, monkeypatch)
    with pytest.raises(Exception, match="k_proj") as refused:
        convert(source, groups=4)
    assert type(refused.value).__module__ == "gqa_convert.errors"
    assert [folder.name for folder in tmp_path.iterdir()] == ["source"]


def tamper_shape(tensors: factories.Tensors) -> None:
    tensors[K] = tensors[K][:8]


def tamper_dtype(tensors: factories.Tensors) -> None:
    tensors[K] = tensors[K].half()


def tamper_missing(tensors: factories.Tensors) -> None:
    del tensors[K]


def tamper_extra(tensors: factories.Tensors) -> None:
    tensors["extra.weight"] = torch.zeros(1)


def tamper_other_shape(tensors: factories.Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:32]


@pytest.mark.parametrize("tamper", [tamper_shape, tamper_dtype, tamper_missing, tamper_extra, tamper_other_shape])
def test_structure_catches_tampered_tensors(tamper: Callable[[factories.Tensors], None], tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    result = convert(source, groups=4)
    factories.change_tensors(result.out, tamper)
    with pytest.raises(VerificationError):
        verify_output(result.plan, result.out, level="structure")


def test_structure_catches_a_config_that_was_not_edited(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    result = convert(source, groups=4)
    factories.change_config(result.out, num_key_value_heads=8)
    with pytest.raises(VerificationError, match="num_key_value_heads reads 8, not 4"):
        verify_output(result.plan, result.out, level="structure")


def test_logits_catch_values_that_structure_cannot(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    result = convert(source, groups=4)
    factories.change_tensors(result.out, lambda tensors: tensors[K].mul_(2))
    verify_output(result.plan, result.out, level="structure")
    with pytest.raises(VerificationError, match="logits differ"):
        verify_output(result.plan, result.out, level="logits")


def test_none_checks_nothing(tmp_path: Path) -> None:
    result = convert(factories.make(tmp_path / "source"), groups=4, verify="none")
    assert (result.verified, result.checks) == ("none", {})


def test_a_pair_is_compared_tensor_by_tensor(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source", shard_size="60KB")
    result = convert(source, groups=4)
    finished = command("gqa", "verify", source, result.out, "--json", "--logits")
    assert finished.code == 0
    checks = json.loads(finished.out)
    assert (checks["merged"], checks["identical"], checks["differing"]) == (4, result.plan.copied_tensors, [])
    assert checks["logit_difference"] <= 1e-4 * checks["logit_scale"]


@pytest.mark.parametrize("key", [K, "model.layers.0.mlp.up_proj.weight"])
def test_a_pair_shows_a_flipped_byte(key: str, tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    out = convert(source, groups=4).out

    def flip(tensors: factories.Tensors) -> None:
        tensors[key].flatten().view(torch.uint8)[17] ^= 1

    factories.change_tensors(out, flip)
    finished = command("gqa", "verify", source, out)
    assert finished.code == 3
    assert finished.out == ""
    assert len(finished.err.splitlines()) == 1
    assert key in finished.err


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_a_pair_is_judged_by_the_method_it_was_made_with(method: str, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "olmo2")
    out = convert(source, groups=2, method=method, seed=5).out
    assert verify_pair(source, out)["differing"] == []


def test_a_model_that_was_trained_further_is_reported_not_refused(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    out = convert(source, groups=4).out
    factories.change_tensors(out, lambda tensors: tensors[K].mul_(1.5))
    (out / "gqa_convert.json").unlink()
    finished = command("gqa", "verify", source, out)
    assert finished.code == 0
    assert K in finished.out


def test_a_pair_of_strangers_is_refused(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    other = factories.make(tmp_path / "other", "llama-head-dim", kv_heads=4)
    finished = command("gqa", "verify", source, other)
    assert finished.code == 3
    assert len(finished.err.splitlines()) == 1


def test_an_mha_folder_is_a_conversion_of_itself(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    assert plan(source, groups=8).merged_tensors == 0
    assert verify_pair(source, source)["differing"] == []
