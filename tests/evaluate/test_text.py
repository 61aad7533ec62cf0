import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from gqa_convert.data import reading
from gqa_convert.data.reading import read_documents
from gqa_convert.errors import HubError, UsageError
from gqa_convert.evaluate.text import Window, encode, windows
from tests.evaluate.tiny import LINES, write_tokenizer


@pytest.mark.parametrize(
    ("total", "context", "stride"), [(100, 16, 8), (101, 16, 5), (64, 16, 1), (17, 16, 15), (9, 16, 8)]
)
def test_every_token_but_the_first_is_scored_once(total: int, context: int, stride: int) -> None:
    scored = [place for window in windows(total, context=context, stride=stride) for place in window.scored]
    assert sorted(scored) == list(range(1, total))


def test_windows_side_by_side_score_their_own_next_tokens() -> None:
    assert windows(35, context=16, stride=16) == [Window(0, 16, 1), Window(16, 16, 1)]


def test_limit_spreads_windows() -> None:
    assert [w.start for w in windows(160, context=16, stride=16, limit=5)] == [0, 32, 64, 96, 128]


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (16, 0), (16, 17)])
def test_impossible_windows_are_refused(context: int, stride: int) -> None:
    with pytest.raises(UsageError, match="1 <= stride <= context"):
        windows(100, context=context, stride=stride)


def test_bytes_of_tokens_add_up_to_the_text(tmp_path: Path) -> None:
    stream = encode(LINES, write_tokenizer(tmp_path))
    assert sum(stream.sizes) == sum(len(line.encode()) for line in LINES)
    assert len(stream.ids) == len(stream.sizes)


@pytest.mark.parametrize(("special", "eos", "first", "last"), [(True, True, 1, 2), (False, False, 57, 16)])
def test_framing_of_documents(tmp_path: Path, special: bool, eos: bool, first: int, last: int) -> None:
    stream = encode(["Wo."], write_tokenizer(tmp_path), special=special, eos=eos)
    assert len(stream.ids) == 3 + special + eos
    assert (stream.ids[0] == 1) == special
    assert (stream.ids[-1] == 2) == eos


def test_read_jsonl_plain_and_demo(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"body": "one\u2028line"}) + "\n\n" + json.dumps({"body": "two"}) + "\n"
    )
    (tmp_path / "b.txt").write_text("one\n<end>\ntwo\n<end>\n")
    assert read_documents(str(tmp_path / "a.jsonl"), field="body") == ["one\u2028line", "two"]
    assert read_documents(str(tmp_path / "b.txt"), separator="<end>") == ["one", "two"]
    assert read_documents(str(tmp_path / "b.txt")) == ["one\n<end>\ntwo\n<end>\n"]
    assert len(read_documents("demo")) > 5


def test_read_what_training_reads(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(folder / "a.parquet")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n')
    (folder / "c.txt").write_text("four")
    (folder / "d.png").write_bytes(b"\x89PNG")
    assert read_documents(str(folder / "a.parquet")) == ["one", "two"]
    assert read_documents(str(folder / "b.jsonl.gz")) == ["three"]
    assert read_documents(str(folder)) == ["one", "two", "three", "four"]
    (folder / "c.txt").write_text("four<end>five")
    assert read_documents(str(folder), separator="<end>")[-2:] == ["four", "five"]


def test_a_hub_dataset_is_read_from_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, configuration: str | None, **options: Any) -> Any:
        asked.append((name, configuration, options["split"]))
        return datasets.Dataset.from_dict({"body": ["one", "two", "three"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("owner/name", field="body") == ["one", "two", "three"]
    monkeypatch.setattr(reading, "_HUB_CHARACTERS", 4)
    assert read_documents("owner/name:part:validation", field="body") == ["one", "two"]
    assert asked == [("owner/name", None, "test"), ("owner/name", "part", "validation")]
    with pytest.raises(UsageError, match=r"--data .*no field 'text'.*have body"):
        read_documents("owner/name")


def test_a_hub_that_is_away_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(HubError, match=r"^my-text: no such file here, and as a hub dataset: .*no route"):
        read_documents("my-text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 1}\n', "no text under 'text'"),
        ("a.jsonl", '{"text": "a"}\n{', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: a list"),
        ("a.txt", "", "holds no text"),
        ("a.txt", None, "--data .*a.txt: no such file"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_documents(str(tmp_path / name))
