from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert.calibrate import self_text
from gqa_convert.calibrate.inputs import calibration_inputs, written_at_once
from gqa_convert.calibrate.tokens import batches, calibration_tokens, document_rows, shorter, token_hash, window_plan
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.data.sampling import documents
from gqa_convert.errors import HubError, UnsupportedModelError, UsageError
from gqa_convert.hf.loading import Source, load_tokenizer
from tests.calibrate.conftest import Saved

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return load_tokenizer(folder)


def texts(count: int) -> list[str]:
    return [" ".join(WORDS[(i + j) % 50] for j in range(1 + i % 7)) for i in range(count)]


def write_jsonl(path: Path, rows: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_documents_are_framed_joined_and_cut(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["w0 w1", "w0 w1", "w0 w1", "w0 w1"])
    ids = calibration_tokens(str(path), tokenizer, sequences=9, length=5)
    assert ids.tolist() == [[1, 4, 5, 2, 1], [4, 5, 2, 1, 4], [5, 2, 1, 4, 5]]
    assert ids.dtype == torch.int64
    assert calibration_tokens(str(path), tokenizer, sequences=2, length=5).shape == (2, 5)


def test_too_little_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["w0 w1"])
    with pytest.raises(UsageError, match=r"gives 4 tokens, less than one window of 5"):
        calibration_tokens(str(path), tokenizer, sequences=1, length=5)


def test_the_seed_decides_and_the_whole_file_is_drawn_from(tokenizer: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [f"w{i // 20}" for i in range(1000)]))
    one, same, other = (calibration_tokens(path, tokenizer, sequences=10, length=12, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(set(one[one > 3].tolist())) > 15


def every_form(folder: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    rows = texts(40)
    write_jsonl(folder / "a.jsonl", rows)
    (folder / "b.txt").write_text("<|endoftext|>".join(rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "c.parquet", row_group_size=7)
    return rows


def test_every_form_gives_every_document_once(tmp_path: Path) -> None:
    rows = every_form(tmp_path)
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        assert sorted(documents(str(tmp_path / name))) == sorted(rows)
    assert sorted(documents(str(tmp_path))) == sorted(rows * 3)


def test_a_text_without_marks_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {i} " + "x" * 100 + "\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    pieces = list(documents(str(tmp_path / "a.txt")))
    assert 2 < len(pieces) < 6
    assert sorted("".join(pieces).splitlines(keepends=True)) == sorted(lines)
    (tmp_path / "empty.txt").write_text("")
    assert list(documents(str(tmp_path / "empty.txt"))) == []


@pytest.mark.parametrize(
    ("content", "message"), [("{bad\n", "not JSON"), ('{"body": 1}\n', 'has no "text" .it has body'), ("[1]\n", "list")]
)
def test_bad_rows_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        list(documents(str(tmp_path / "a.jsonl")))


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "folder").mkdir()
    for data, message in (("a.csv", "cannot be read"), ("folder", "holds no"), ("b.jsonl", "no such file")):
        with pytest.raises(UsageError, match=message):
            documents(str(tmp_path / data))


def test_compressed_files_are_read_too(tmp_path: Path) -> None:
    rows = texts(30)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    read = list(documents(str(tmp_path / "a.jsonl.gz")))
    assert sorted(read) == sorted(rows)
    assert read != rows  # drawn from all over
    assert sorted(documents(str(tmp_path))) == sorted(rows)


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": texts(30)}).to_iterable_dataset()
    asked = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(documents("owner/name:part")) == sorted(texts(30))
    assert sorted(documents("owner/name:part:other")) == sorted(texts(30))
    assert asked == [
        ("owner/name", "part", {"split": "train", "streaming": True}),
        ("owner/name", "part", {"split": "other", "streaming": True}),
    ]


def test_hub_errors_have_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(HubError, match=r"owner/name: no such file here.*no route"):
        next(documents("owner/name"))
    other = datasets.Dataset.from_dict({"body": ["a"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: other)
    with pytest.raises(UsageError, match="no text column"):
        next(documents("owner/name"))


def test_windows_fit_the_context() -> None:
    assert window_plan(4096) == (128, 2048)
    assert window_plan(None) == (128, 2048)
    assert window_plan(512) == (512, 512)
    assert window_plan(100, sequences=1, length=250) == (3, 100)


def test_batches_cut_all_inputs_alike() -> None:
    inputs = {"input_ids": torch.arange(10).view(5, 2), "decoder_input_ids": torch.arange(15).view(5, 3)}
    cut = batches(inputs, 2)
    assert [len(each["input_ids"]) for each in cut] == [2, 2, 1]
    assert cut[2]["decoder_input_ids"].tolist() == [[12, 13, 14]]
    assert token_hash(inputs) != token_hash(inputs["input_ids"])
    assert token_hash(inputs["input_ids"]) == token_hash({"input_ids": inputs["input_ids"].clone()})


def test_a_model_writes_its_own_text(saved: Callable[..., Saved]) -> None:
    source = saved("llama").source
    one, same, other = (self_text.self_tokens(source, sequences=5, length=12, seed=s, batch=3) for s in (0, 0, 1))
    assert one.shape == (5, 12)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (one[:, 0] == 1).all()


@pytest.mark.parametrize(("length", "piece"), [(20, 7), (21, 7), (6, 7)])
def test_long_windows_are_pieces_that_each_begin(saved: Callable[..., Saved], length: int, piece: int) -> None:
    told: list[int] = []
    source = saved("llama").source
    ids = self_text.self_tokens(source, sequences=5, length=length, piece=piece, batch=2, progress=told.append)
    assert ids.shape == (5, length)
    assert (ids[:, ::piece] == 1).all()
    assert sum(told) == 5
    again = self_text.self_tokens(source, sequences=5, length=length, piece=piece, batch=2)
    assert torch.equal(ids, again)


def test_the_text_follows_the_model(saved: Callable[..., Saved]) -> None:
    """At a low temperature it is what greedy decoding gives."""
    source = saved("llama")
    ids = self_text.self_tokens(source.source, sequences=1, length=10, temperature=1e-4)
    with torch.no_grad():
        best = source.model(ids, use_cache=False).logits.argmax(-1)
    ends = ids[0, :-1] == 2
    assert torch.equal(ids[0, 1:][~ends], best[0, :-1][~ends])


def test_an_ended_document_is_followed_by_a_new_one(
    saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "document_marks", lambda model: (7, list(range(20, 128))))
    ids = self_text.self_tokens(saved("llama").source, sequences=4, length=20)
    after = ids[:, 1:][ids[:, :-1] >= 20]
    assert len(after) > 10
    assert (after == 7).all()


def test_one_token_may_end_a_document_and_begin_the_next(
    saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `<|endoftext|>` does for GPT-2: it must not call for itself for ever."""
    monkeypatch.setattr(self_text, "document_marks", lambda model: (7, [7]))
    ids = self_text.self_tokens(saved("llama").source, sequences=4, length=20)
    assert (ids[:, 0] == 7).all()
    assert len(set(ids[:, 1:].flatten().tolist())) > 20


def test_without_a_beginning_the_first_tokens_are_drawn(
    saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "document_marks", lambda model: (None, [2]))
    ids = self_text.self_tokens(saved("llama").source, sequences=8, length=3)
    assert len(set(ids[:, 0].tolist())) > 3


def test_an_encoder_decoder_answers_but_does_not_begin(saved: Callable[..., Saved], tokens: torch.Tensor) -> None:
    source = saved("t5").source
    with pytest.raises(UnsupportedModelError, match="cannot write text from nothing"):
        self_text.self_tokens(source, sequences=2, length=8)
    answers = self_text.own_answers(source, [tokens[:3, :8], tokens[:5]])
    asked = [row for parts in answers for row in parts["input_ids"].tolist()]
    assert sorted(asked) == sorted([*tokens[:3, :8].tolist(), *tokens[:5].tolist()])
    for parts in answers:
        assert len(parts["input_ids"]) == len(parts["decoder_input_ids"])
        assert parts["decoder_input_ids"].shape[1] == shorter(parts["decoder_input_ids"].shape[1]) <= 16
        assert (parts["decoder_input_ids"][:, 0] == 0).all()  # T5 starts with its padding


def test_an_answer_ends_where_the_model_ends_it(
    saved: Callable[..., Saved], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("t5").source
    monkeypatch.setattr(self_text, "document_marks", lambda model: (0, list(range(1, 60))))
    answers = self_text.own_answers(source, [tokens])
    for parts in answers:
        assert not torch.isin(parts["decoder_input_ids"], torch.arange(1, 60)).any()
    assert sum(parts["decoder_input_ids"].numel() for parts in answers) < 3 * len(tokens)


def test_lengths_are_few() -> None:
    assert [shorter(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 100, 512)] == [1, 2, 3, 4, 4, 6, 6, 8, 8, 12, 96, 512]


class Words:
    """A tokenizer of words, with a mark before and behind every text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + len(word) for word in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_rows_are_single_documents_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a bb ccc dddd eeeee", "a", "bb " * 20]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    framed = document_rows(str(tmp_path / "a.jsonl"), Words(), tokens=1000, length=12)
    rows = sorted(row for ids in framed for row in ids.tolist())
    assert rows == sorted([[1, 11, 12, 13, 14, 2], [1, *[12] * 10, 2], [1, *[12] * 10, 2]])
    assert [ids.shape[1] for ids in framed] == [6, 12]
    few = document_rows(str(tmp_path / "a.jsonl"), Words(), tokens=1, length=12)
    assert sum(map(len, few)) in (1, 2)  # one document
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(UsageError, match=r"b\.txt: no document has 4 tokens"):
        document_rows(str(tmp_path / "b.txt"), Words(), tokens=10, length=8)


def test_batches_of_several_shapes_are_mixed() -> None:
    inputs = [{"input_ids": torch.full((6, n), n)} for n in (2, 3, 4)]
    cut = batches(inputs, lambda parts: 12 // parts["input_ids"].shape[1])
    shapes = sorted(tuple(part["input_ids"].shape) for part in cut)
    assert shapes == [(2, 3), (3, 4), (3, 4), (4, 3), (6, 2)]
    lengths = [part["input_ids"].shape[1] for part in cut]
    assert lengths != sorted(lengths)
    assert token_hash(inputs) != token_hash(inputs[:2])


def test_inputs_of_a_recipe(saved: Callable[..., Saved], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llama")
    assert calibration_inputs(Recipe(), source.source, work=work) is None
    recipe = Recipe(calibrate="self", sequences=4, length=8)
    first = calibration_inputs(recipe, source.source, work=work)
    assert first is not None
    assert first[0]["input_ids"].shape == (4, 8)
    monkeypatch.setattr("gqa_convert.calibrate.inputs.self_tokens", None)
    again = calibration_inputs(recipe, source.source, work=work)
    assert again is not None
    assert torch.equal(first[0]["input_ids"], again[0]["input_ids"])


def test_answers_are_written_once(
    saved: Callable[..., Saved], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("t5")
    monkeypatch.setattr(Source, "tokenizer", lambda self: Words())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "a bb ccc " * n}) + "\n" for n in (2, 3, 4)))
    recipe = Recipe(calibrate=str(tmp_path / "a.jsonl"), sequences=4, length=16)
    first = calibration_inputs(recipe, source.source, work=work)
    monkeypatch.setattr("gqa_convert.calibrate.inputs.own_answers", None)
    again = calibration_inputs(recipe, source.source, work=work)
    assert first is not None
    assert again is not None
    assert len(first) == len(again) > 1
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["decoder_input_ids"], other["decoder_input_ids"])


def test_an_encoder_decoder_needs_a_text(saved: Callable[..., Saved], work: Path) -> None:
    source = saved("t5")
    with pytest.raises(UsageError, match="Name a file"):
        calibration_inputs(Recipe(calibrate="self"), source.source, work=work)


def test_long_windows_are_written_few_at_a_time(saved: Callable[..., Saved]) -> None:
    config = saved("llama").config
    assert written_at_once(config, 64, 1000) == 256
    assert written_at_once(config, 64, 10) == 10
    assert written_at_once(config, 10**9, 10) == 1
