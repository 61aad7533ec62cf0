"""Measuring a conversion whose original is of another family."""

from __future__ import annotations

from pathlib import Path

import pytest

from gqa_convert import convert
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.sensitivity import layer_costs
from gqa_convert.evaluate.similarity import head_similarity
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GPT-NeoX model with a tokenizer, and its conversion, which is a Phi model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("transpiled")
    source = folder / "source"
    tiny_model(tiny_config("gpt_neox")).save_pretrained(source)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(source)
    convert(source, groups=2, out=folder / "converted")
    (folder / "text.txt").write_text(" ".join(f"w{(7 * i * i + i) % 100}" for i in range(400)))
    return source, folder / "converted"


def settings(pair: tuple[Path, Path]) -> EvalSettings:
    return EvalSettings(data=str(pair[0].parent / "text.txt"), context=32, stride=32, max_windows=4, device="cpu")


def test_divergence_and_cache_are_measured(pair: tuple[Path, Path]) -> None:
    identity = pair[0].parent / "identity"
    convert(pair[0], groups=8, out=identity)
    same, merged = evaluate(pair[0], [identity, pair[1]], settings(pair)).converted
    assert abs(same.loss_difference) < 1e-5
    assert same.kl < 1e-6
    assert merged.kl > 1e-3
    assert (same.model.kv_heads, merged.model.kv_heads) == (8, 2)
    assert same.model.kv_cache_bytes_per_token == 4 * merged.model.kv_cache_bytes_per_token


def test_layers_are_weighed_one_by_one(pair: tuple[Path, Path]) -> None:
    costs = layer_costs(pair[0], pair[1], settings(pair))
    assert [cost.layer for cost in costs] == ["model.layers.0", "model.layers.1"]
    assert any(abs(cost.loss_difference) > 1e-4 for cost in costs)


def test_heads_are_compared(pair: tuple[Path, Path]) -> None:
    assert len(head_similarity(pair[0], 2)) == 2


def test_the_tokenizer_goes_along(pair: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    text = "w3 w99 w7"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in pair]
    assert ids[0] == ids[1] == [3, 99, 7]
