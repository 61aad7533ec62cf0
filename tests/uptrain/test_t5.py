"""Span corruption on a tiny T5, from text to the final folder."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from gqa_convert import convert
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.data.batches import IGNORE, collate_pairs
from gqa_convert.data.conversations import UNSCORED, conversation
from gqa_convert.data.encoding import Encoder
from gqa_convert.data.packing import filled
from gqa_convert.data.sampling import documents
from gqa_convert.errors import UsageError
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.heal import HealOptions, heal, heal_rate, heal_settings
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


def pairs(folder: Path, *, names: tuple[str, str] = ("input", "target")) -> Path:
    """Lines that say a word of the text again."""
    from tests.uptrain.conftest import WORDS

    draw = random.Random(0)
    rows = []
    for _ in range(400):
        words = [draw.choice(WORDS) for _ in range(draw.randrange(3, 9))]
        rows.append({names[0]: " ".join(words), names[1]: words[0]})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pair_settings(t5_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    t5_settings["objective"] = {"kind": "text_to_text"}
    t5_settings["data"]["source"] = {"kind": "jsonl", "paths": [str(pairs(tmp_path))]}
    t5_settings["optimizer"] = {"kind": "adamw"}
    t5_settings["schedule"] = {"kind": "constant", "peak": 5e-3}
    return t5_settings


def test_answers_are_learnt_from_rows_of_a_text_and_its_answer(pair_settings: dict[str, Any]) -> None:
    result = loop.uptrain(parse_config({**pair_settings, "budget": {"steps": 60}}), quiet=True)
    assert result.loss_after < result.loss_before - 1.0


def test_what_a_pair_becomes(t5_folder: Path) -> None:
    """The encoder reads the text with its padding masked, the decoder the answer shifted; logits are a pair's alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    encoder = Encoder(tokenizer, append_eos=False, pairs=8)
    rows = [{"input": "cat dog bird", "target": "cat"}, {"prompt": "the fish", "completion": "fish the big"}]
    documents = [conversation(row, "text") for row in rows]
    assert all(document is not None for document in documents)
    ids = encoder.encode([document for document in documents if document is not None])
    block = filled(ids, 16)
    batch = collate_pairs(decoder_start=0, pad=0)([(0, block, 16)])
    assert batch.valid == 2 + 4
    masks = batch.inputs["attention_mask"].bool()
    said = [tokenizer.decode(row[mask]) for row, mask in zip(batch.inputs["input_ids"], masks, strict=True)]
    assert said == ["cat dog bird", "the fish"]
    assert [tokenizer.decode(row[row != IGNORE]) for row in batch.labels] == ["cat </s>", "fish the big </s>"]
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_folder).eval()
    logits = model(**batch.inputs).logits
    for row, (text, answer) in enumerate((("cat dog bird", "cat"), ("the fish", "fish the big"))):
        alone = tokenizer(text, return_tensors="pt").input_ids
        labels = tokenizer(answer + " </s>", return_tensors="pt").input_ids
        expected = model(input_ids=alone, labels=labels).logits[0]
        torch.testing.assert_close(logits[row, : labels.shape[1]], expected, atol=1e-5, rtol=1e-5)


def test_long_pairs_are_cut_and_other_conversations_refused(t5_folder: Path) -> None:
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(t5_folder), append_eos=False, pairs=8)
    long = conversation({"input": "cat " * 20, "target": "dog " * 20}, "text")
    assert long is not None
    ids = encoder.encode([long])[0]
    assert len(ids) == 8
    assert int(((ids & UNSCORED) == 0).sum()) == 4
    assert ids[-1] == encoder.tokenizer.eos_token_id
    talk = conversation({"messages": [{"role": "user", "content": "cat"}] * 3}, "messages")
    assert talk is not None
    with pytest.raises(UsageError, match="has the turns user, user, user"):
        encoder.encode([talk])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"packing": "cut"}}, "kept whole"),
        ({"objective": {"distillation": {"teacher": "x", "cache": "y"}}}, "not with text_to_text"),
    ],
    ids=["cut", "cache"],
)
def test_what_text_to_text_cannot_do_is_one_line(
    change: dict[str, dict[str, Any]], words: str, pair_settings: dict[str, Any]
) -> None:
    for section, values in change.items():
        pair_settings[section] |= values
    with pytest.raises(UsageError, match=words):
        parse_config(pair_settings)


def test_plain_text_has_no_answers(pair_settings: dict[str, Any], text_file: Path) -> None:
    pair_settings["data"]["source"]["paths"] = [str(text_file)]
    with pytest.raises(UsageError, match=r"holds text, and objective\.kind=text_to_text learns answers"):
        loop.uptrain(parse_config(pair_settings), quiet=True)


def test_an_encoder_decoder_is_healed_on_its_originals_answers(
    t5_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Also on rows that hold answers already; nothing but attention and its norms moves."""
    converted = convert(t5_folder, groups=1, out=tmp_path / "gqa").out
    held_out = str(pairs(tmp_path))
    options = HealOptions(text=str(text_file), held_out=held_out, tokens=4096, context=32, rate=0.01, answers=True)
    result = heal(converted, t5_folder, out=tmp_path / "healed", options=options, work=tmp_path / "work", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "work" / "original-answered.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["input"] and row["target"] for row in rows)
    whole = set(documents(str(text_file)))
    cut = [row["input"] for row in rows if row["input"] not in whole]
    assert 0 < len(cut) < len(rows), "short documents are answered whole, long ones from their beginning"
    assert all(any(text.startswith(said) for text in whole) for said in cut)
    before, after = (load_file(folder / "model.safetensors") for folder in (converted, result.out))
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved
    assert {key for key in moved if "Attention" not in key and "layer_norm" not in key} == set()
    settings = heal_settings(HealOptions(text=held_out), converted, t5_folder, tmp_path)
    assert settings["objective"]["kind"] == "text_to_text"
    settings = heal_settings(HealOptions(text=str(text_file)), converted, t5_folder, tmp_path)
    assert settings["objective"]["kind"] == "span_corruption"
    assert settings["schedule"]["peak"] < heal_rate(32)
    assert settings["optimizer"]["relative"], "its queries' weights are far smaller than the others"


def test_only_encoder_decoders_answer(tiny_folder: Path, t5_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a llama carries on what it reads"):
        heal_settings(HealOptions(text=str(text_file), answers=True), tiny_folder, tiny_folder, tmp_path)
    with pytest.raises(UsageError, match="needs one text to answer"):
        HealOptions(answers=True)
