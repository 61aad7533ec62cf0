import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from gqa_convert.conversion.execute import convert
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.examples import span_examples
from gqa_convert.evaluate.text import TokenStream
from gqa_convert.tiny.shrink import tiny_config
from tests.evaluate.tiny import LINES, write_tokenizer


@pytest.fixture(scope="module")
def t5gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-t5gemma"
    config = tiny_config("t5gemma", num_heads=4, num_kv_heads=4)
    for part in (config, config.encoder, config.decoder):
        part.vocab_size = 280
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder, sentinels=4)
    return folder


def test_hidden_spans_can_be_put_back() -> None:
    stream = TokenStream(list(range(100, 200)), [1] * 100)
    examples = span_examples(stream, [1, 2, 3, 4, 5, 6], start=0, context=50)
    assert len(examples) == 2
    assert examples[0].shape == examples[1].shape
    for number, example in enumerate(examples):
        source, target = example.inputs["input_ids"].tolist(), example.targets.tolist()
        hidden: dict[int, list[int]] = {}
        for token in target:
            if token < 100:
                hidden[token] = []
            else:
                hidden[max(hidden)].append(token)
        whole = [t for token in source for t in (hidden[token] if token < 100 else [token])]
        assert whole == list(range(100 + 50 * number, 150 + 50 * number))
        assert example.size == sum(map(len, hidden.values())) == round(50 * 0.15)
        assert example.inputs["decoder_input_ids"].tolist() == [0, *target[:-1]]


def test_span_corruption_agrees_with_transformers_own_loss(t5gemma: Path, lines: Path) -> None:
    out = convert(t5gemma, groups=2, out=t5gemma.with_name("tiny-t5gemma-gqa2"), force=True).out
    evaluation = evaluate(t5gemma, [out], EvalSettings(data=str(lines), context=32, max_windows=6))
    assert evaluation.task == "span corruption"
    assert evaluation.converted[0].model.kv_heads == 2
    assert evaluation.converted[0].kl > 0
    tokens = {part.name: part.tokens for part in evaluation.converted[0].parts if part.by == "kind"}
    assert sum(tokens.values()) == evaluation.tokens
    assert tokens["special"] > 0, "sentinels"


def test_a_converted_t5_is_measured_against_its_source(lines: Path, tmp_path: Path) -> None:
    config = tiny_config("t5")
    config.vocab_size, config.decoder_start_token_id = 280, 0
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5", sentinels=4)
    convert(tmp_path / "t5", groups=2, cross_groups=4, out=tmp_path / "gqa")
    evaluation = evaluate(tmp_path / "t5", [tmp_path / "gqa"], EvalSettings(data=str(lines), context=32, max_windows=4))
    assert evaluation.converted[0].model.kv_heads == 2
    assert evaluation.converted[0].kl > 0


def test_pairs_agree_with_transformers_own_loss(t5gemma: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    pairs = [(line[:20], line[20:60]) for line in LINES[:5]]
    data.write_text("".join(json.dumps({"input": a, "target": b}) + "\n" for a, b in pairs))
    evaluation = evaluate(t5gemma, [], EvalSettings(data=str(data), context=48))
    model = AutoModelForSeq2SeqLM.from_pretrained(t5gemma).eval()
    tokenizer = write_tokenizer(tmp_path, sentinels=4)
    total, count = 0.0, 0
    for source, target in pairs:
        labels = torch.tensor([tokenizer(target)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([tokenizer(source)["input_ids"]]), labels=labels).loss
        total, count = total + float(loss) * labels.numel(), count + labels.numel()
    assert evaluation.task == "pairs"
    assert evaluation.base.loss == pytest.approx(total / count, abs=1e-4)
    assert evaluation.bytes == sum(len(target.encode()) for _, target in pairs)


def test_text_without_sentinels_is_refused(t5gemma: Path, lines: Path, tmp_path: Path) -> None:
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(t5gemma, plain)
    write_tokenizer(plain)
    with pytest.raises(UsageError, match="extra_id_0"):
        evaluate(plain, [], EvalSettings(data=str(lines)))
