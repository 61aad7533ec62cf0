import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gqa_convert.data import documents as module
from gqa_convert.data.documents import Corpus, SourceSpec, open_corpus
from gqa_convert.data.split import is_held_out
from gqa_convert.errors import CheckpointError, HubError, UsageError


def texts(spec: SourceSpec) -> list[Any]:
    return list(open_corpus(spec).all_documents())


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    with open(tmp_path / "b.jsonl", "w") as file:
        file.writelines(json.dumps({"text": t, "other": 1}) + "\n" for t in ("four", "five"))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["six", "seven"]}), tmp_path / "c.parquet")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "eight"}\n')
    (tmp_path / ".hidden.txt").write_text("no")
    return tmp_path


def test_every_kind_of_file(corpus_folder: Path) -> None:
    here = str(corpus_folder)
    assert texts(SourceSpec(kind="text", paths=(f"{here}/*.txt",))) == ["one\ntwo\n\nthree\n"]
    assert texts(SourceSpec(kind="text", paths=(f"{here}/a.txt",), documents="line")) == ["one", "two", "three"]
    assert texts(SourceSpec(kind="jsonl", paths=(f"{here}/b.jsonl",))) == ["four", "five"]
    assert texts(SourceSpec(kind="parquet", paths=(f"{here}/c.parquet",))) == ["six", "seven"]
    read = texts(SourceSpec(kind="folder", paths=(here,)))
    assert read == ["one\ntwo\n\nthree\n", "four", "five", "six", "seven", "eight"]


def test_a_separator_cuts_documents_and_can_be_resumed_within_a_line(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("once\nupon<|end|>a<|end|>time\n<|end|>\nlast\n")
    spec = SourceSpec(kind="text", paths=(str(file),), documents="<|end|>")
    expected = ["once\nupon", "a", "time", "last"]
    assert texts(spec) == expected
    for taken in range(5):
        reader = open_corpus(spec).read(0)
        before = [next(reader) for _ in range(taken)]
        state = json.loads(json.dumps(reader.state()))
        assert before + list(open_corpus(spec).read(0, state)) == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_resumes_at_any_document(corpus_folder: Path, kind: str) -> None:
    spec = SourceSpec(kind=kind, paths=(str(corpus_folder / {"jsonl": "b.jsonl", "parquet": "c.parquet"}[kind]),))
    whole = texts(spec)
    reader = open_corpus(spec).read(0)
    first = next(reader)
    assert [first, *open_corpus(spec).read(0, reader.state())] == whole


def some_documents() -> Iterator[str]:
    yield from ("x", "y", "z")


def test_a_python_function_is_a_source() -> None:
    spec = SourceSpec(kind="python", paths=(f"{__name__}:some_documents",))
    reader = open_corpus(spec).read(0)
    assert next(reader) == "x"
    assert list(open_corpus(spec).read(0, reader.state())) == ["y", "z"]
    with pytest.raises(UsageError, match="names no function"):
        open_corpus(SourceSpec(kind="python", paths=("no_such_module:make",)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SourceSpec(kind="jsonl", paths=("/nowhere/*.jsonl",)), "matches no file"),
        (SourceSpec(kind="tape", paths=("x",)), "choose one of"),
    ],
)
def test_what_is_not_there_is_said(spec: SourceSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_corpus(spec)


def test_a_missing_field_names_the_present_ones(corpus_folder: Path) -> None:
    with pytest.raises(UsageError, match="text, other"):
        texts(SourceSpec(kind="jsonl", paths=(str(corpus_folder / "b.jsonl"),), text_field="body"))


class Flaky:
    """Five rows; the connection drops before the third, `drops` times over all openings."""

    drops = 0

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        for i in range(self.at, 5):
            if i == 2 and Flaky.drops > 0:
                Flaky.drops -= 1
                raise ConnectionError("connection reset")
            self.at = i + 1
            yield {"text": f"row {i}"}

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def flaky_corpus(waits: list[float]) -> Corpus:
    spec = SourceSpec(kind="hub", paths=("org/data",))
    return Corpus(spec=spec, shards=[Flaky], identity=[], remote=True, sleep=waits.append)


def test_an_outage_is_waited_out_without_losing_or_repeating_a_document() -> None:
    Flaky.drops = 3
    waits: list[float] = []
    assert list(flaky_corpus(waits).all_documents()) == [f"row {i}" for i in range(5)]
    assert waits == list(module._RETRY_SECONDS[:3])


def test_a_lasting_outage_stops_clean() -> None:
    Flaky.drops = 99
    with pytest.raises(HubError, match="Run again"):
        list(flaky_corpus([]).all_documents())


def test_a_hub_dataset_that_cannot_be_loaded_is_a_hub_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    waits: list[float] = []
    with pytest.raises(HubError, match="org/data"):
        open_corpus(SourceSpec(kind="hub", paths=("org/data",)), sleep=waits.append)
    assert len(waits) == 4


def test_a_hub_dataset_is_streamed_shard_by_shard(monkeypatch: pytest.MonkeyPatch, corpus_folder: Path) -> None:
    import datasets

    real = datasets.load_dataset

    def local(name: str, config: str | None, **kwargs: Any) -> Any:
        return real("json", data_files=[str(corpus_folder / "b.jsonl"), str(corpus_folder / "d.jsonl.gz")],
                    split="train", streaming=True)  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", local)
    corpus = open_corpus(SourceSpec(kind="hub", paths=("org/data",)))
    assert len(corpus.shards) == 2
    assert list(corpus.all_documents()) == ["four", "five", "eight"]


def test_the_split_follows_the_document_and_nothing_else() -> None:
    some = [f"document {i}" for i in range(20_000)]
    held = [t for t in some if is_held_out(t, 0.05)]
    assert 0.04 < len(held) / len(some) < 0.06
    assert set(held) <= {t for t in some if is_held_out(t, 0.1)}
    assert not any(is_held_out(t, 0.0) for t in some)
    assert all(is_held_out(t, 1.0) for t in some)


def test_a_folder_is_read_by_known_suffixes_unless_a_pattern_says_more(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "c.bin").write_bytes(b"\xff\x00")
    every = open_corpus(SourceSpec(kind="folder", paths=(str(tmp_path),)))
    assert list(every.all_documents()) == ["one"]
    chosen = open_corpus(SourceSpec(kind="folder", paths=(str(tmp_path),), pattern="*.md"))
    assert list(chosen.all_documents()) == ["two"]


ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", ROWS + '{"text": "unfinish\n' + ROWS, r"a\.jsonl, line 6: not JSON"),
        ("a.jsonl", ROWS + "[1, 2]\n", r"line 6: holds a list, not an object"),
        ("a.jsonl", ROWS + '{"text": {"a": 1}}\n', r"line 6: its field 'text' holds a dict, not text"),
        ("a.jsonl", ROWS.encode() + b'{"text": "\xff"}\n', r"line 6: not UTF-8 text \(byte 0xff\)"),
        ("a.jsonl", ROWS + '{"text": "\\ud800"}\n', "line 6: .*half a surrogate pair"),
        ("a.jsonl", ROWS + '{"text": ' + "9" * 5000 + "}\n", "line 6: not JSON"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl: not JSON"),
        ("a.jsonl", '[{"text": "x"},\n{"text": }]', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b"\0" * 1000, "line 1: not JSON"),
        ("a.jsonl", '{"body": "x"}\n', "line 1: has no field 'text'; it has body"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(ROWS.encode())[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.txt", b"fine\n\xff\xfe\n", r"a\.txt, line 2: not UTF-8 text \(byte 0xff at column 1\)"),
        ("a.parquet", b"PAR1 and nothing", r"a\.parquet: cannot be read as parquet"),
        ("a.parquet", b"", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_file_and_line(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        texts(SourceSpec(kind=cast(str, module.kind_of(file)), paths=(str(file),)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("harm", ["bytes", "column"])
def test_damage_inside_a_parquet_file_names_it(tmp_path: Path, harm: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [[1], [2]] if harm == "column" else ["six" * 1000, "seven"] * 1000}), file)
    if harm == "bytes":
        data = bytearray(file.read_bytes())
        data[100:200] = b"\x55" * 100
        file.write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.parquet: cannot be read as parquet"):
        texts(SourceSpec(kind="parquet", paths=(str(file),)))


def test_texts_of_json_come_as_they_are(tmp_path: Path) -> None:
    rows = ["2020-01-01", "12:30", "", "NaN", "x" * 100_000, "grüße 🎈", "a\u2028b"]
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in rows) + "\n{}\n")
    spec = SourceSpec(kind="jsonl", paths=(str(file),))
    kept = [t for t in rows if t]
    assert texts(spec) == kept
    array = tmp_path / "b.json"
    array.write_text(json.dumps([{"text": t} for t in rows], indent=1))
    assert texts(SourceSpec(kind="jsonl", paths=(str(array),))) == kept
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as packed:
        packed.write(file.read_bytes())
    for path in (file, array, tmp_path / "c.jsonl.gz"):
        spec = SourceSpec(kind="jsonl", paths=(str(path),))
        for taken in range(len(kept) + 1):
            reader = open_corpus(spec).read(0)
            before = [next(reader) for _ in range(taken)]
            state = json.loads(json.dumps(reader.state()))
            assert before + list(open_corpus(spec).read(0, state)) == kept


def test_every_hub_dataset_that_is_named_is_read(monkeypatch: pytest.MonkeyPatch, corpus_folder: Path) -> None:
    import datasets

    real = datasets.load_dataset
    files = {"org/one": "b.jsonl", "org/two": "d.jsonl.gz"}

    def local(name: str, config: str | None, **kwargs: Any) -> Any:
        return real("json", data_files=str(corpus_folder / files[name]), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    corpus = open_corpus(SourceSpec(kind="hub", paths=("org/one", "org/two")))
    assert list(corpus.all_documents()) == ["four", "five", "eight"]
    assert corpus.identity != open_corpus(SourceSpec(kind="hub", paths=("org/two", "org/one"))).identity


def broken_documents() -> Iterator[Any]:
    yield "fine"
    yield 5


def test_a_function_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"broken_documents: the function failed at .*document 1 is a int"):
        texts(SourceSpec(kind="python", paths=(f"{__name__}:broken_documents",)))


@pytest.mark.parametrize(
    "state", [{}, {"ready": 5, "pending": "", "rows": {}}, {"ready": [], "pending": "", "rows": 3}]
)
def test_a_place_that_is_none_is_refused(corpus_folder: Path, state: dict[str, Any]) -> None:
    spec = SourceSpec(kind="jsonl", paths=(str(corpus_folder / "b.jsonl"),))
    with pytest.raises(CheckpointError, match="cannot be gone back to"):
        list(open_corpus(spec).read(0, state))
