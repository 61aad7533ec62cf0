"""Span corruption on a tiny T5, from text to the final folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from gqa_convert import convert
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.errors import UsageError
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import parse_config
from tests.support import load_with_info


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    from tests.uptrain.conftest import WORDS

    folder = tmp_path_factory.mktemp("t5")
    sentinels = [f"<extra_id_{i}>" for i in range(10)]
    words = ["<pad>", "</s>", "<unk>", *WORDS]
    vocabulary = {word: i for i, word in enumerate([*words, *reversed(sentinels)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=sentinels,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(  # type: ignore[call-arg]
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=len(vocabulary),
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def t5_settings(settings: dict[str, Any], t5_folder: Path) -> dict[str, Any]:
    settings["model"] = str(t5_folder)
    settings["objective"] = {"kind": "span_corruption"}
    settings["optimizer"] = {"kind": "adafactor", "clip": None}
    settings["schedule"] = {"kind": "inverse_sqrt", "peak": 1.0, "start_step": 0, "offset": 400}
    settings["train"]["dropout"] = 0.0
    return settings


def test_the_papers_recipe_runs_and_learns(t5_settings: dict[str, Any]) -> None:
    result = loop.uptrain(parse_config({**t5_settings, "budget": {"steps": 40}}), quiet=True)
    assert result.loss_after < result.loss_before - 0.3
    _, info = load_with_info(result.folder, AutoModelForSeq2SeqLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_converted_t5_keeps_its_code(t5_settings: dict[str, Any], t5_folder: Path, tmp_path: Path) -> None:
    converted = convert(t5_folder, groups=2, cross_groups=1, out=tmp_path / "gqa").out
    values = {**t5_settings, "model": str(converted), "budget": {"steps": 20}}
    values["objective"]["distillation"] = {"teacher": str(t5_folder), "dtype": "float32"}
    result = loop.uptrain(parse_config(values), quiet=True)
    assert result.loss_after < result.loss_before
    assert (result.folder / "modeling_gqa.py").read_bytes() == (converted / "modeling_gqa.py").read_bytes()
    model, info = load_with_info(result.folder, AutoModelForSeq2SeqLM)
    assert not any(info.values())
    assert model.decoder.block[1].layer[0].SelfAttention.k.weight.shape == (2 * 8, 32)
    assert model.decoder.block[1].layer[1].EncDecAttention.v.weight.shape == (8, 32)
    checks = verify_pair(t5_folder, result.folder)
    assert checks["merged"] == 0  # training moved them all


def test_a_t5_can_be_distilled(t5_settings: dict[str, Any], t5_folder: Path) -> None:
    t5_settings["objective"]["distillation"] = {"teacher": str(t5_folder), "dtype": "float32", "hidden_weight": 0.5}
    result = loop.uptrain(parse_config({**t5_settings, "budget": {"steps": 2}}), quiet=True)
    first = read_metrics(result.folder.parent / "metrics.jsonl")[0]
    assert abs(first["held_out_kl"]) < 1e-4  # it is its own teacher
    assert result.reference_loss == pytest.approx(result.loss_before, abs=1e-4)


def test_held_out_losses_of_any_seed_are_of_one_task(t5_settings: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for seed in (1, 2):
        values = {**t5_settings, "output": str(tmp_path / str(seed)), "budget": {"steps": 1}}
        values["train"] = values["train"] | {"seed": seed}
        results.append(loop.uptrain(parse_config(values), quiet=True))
    assert results[0].loss_before == results[1].loss_before
    assert results[0].loss_after != results[1].loss_after  # other spans of other blocks were trained on


def test_an_objective_that_does_not_fit_the_model_is_refused(
    t5_settings: dict[str, Any], settings: dict[str, Any], tiny_folder: Path
) -> None:
    with pytest.raises(UsageError, match="needs causal_lm"):
        loop.uptrain(parse_config({**t5_settings, "model": str(tiny_folder)}), quiet=True)
    t5_settings["data"]["separate_documents"] = True
    with pytest.raises(UsageError, match="relative positions"):
        parse_config(t5_settings)
