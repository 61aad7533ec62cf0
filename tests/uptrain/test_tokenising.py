"""Tokenising in parts: the same tokens however it is done, and nothing twice after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from gqa_convert.data.documents import Corpus, SourceSpec, open_corpus
from gqa_convert.data.encoding import Encoder, Ids
from gqa_convert.data.split import is_held_out
from gqa_convert.errors import Preempted
from gqa_convert.uptrain import tokenising
from gqa_convert.uptrain.making import Making


@pytest.fixture
def corpus(text_file: Path, tmp_path: Path) -> Corpus:
    lines = text_file.read_text().splitlines()
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines[number::3]) + "\n")
    return open_corpus(SourceSpec(kind="jsonl", paths=(str(tmp_path / "*.jsonl"),)))


@pytest.fixture
def encoder(tiny_folder: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(tiny_folder))


def straight(corpus: Corpus, encoder: Encoder, fraction: float) -> list[tuple[list[int], bool]]:
    texts = list(corpus.all_documents())
    return [(ids.tolist(), is_held_out(text, fraction)) for text, ids in zip(texts, encoder.encode(texts), strict=True)]


def seen(rows: Iterable[tuple[Ids, bool]]) -> list[tuple[list[int], bool]]:
    return [(ids.tolist(), held_out) for ids, held_out in rows]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_parts_give_the_same_documents_in_the_same_order(
    corpus: Corpus, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(tokenising, "PART_CHARACTERS", 3000)
    folder = tmp_path / "parts"
    folder.mkdir()
    rows = tokenising.tokenised(corpus, encoder, folder, fraction=0.2, processes=processes)
    assert seen(rows) == straight(corpus, encoder, 0.2)
    assert len(list(folder.glob("part-*.npz"))) > 5


def test_finished_parts_are_not_made_again(
    corpus: Corpus, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PART_CHARACTERS", 3000)
    making = Making(tmp_path / "tokens", encoder, lambda _: None, lambda: False, check=True)
    encoded: list[str] = []
    real = Encoder.encode

    def encode(self: Any, texts: list[str]) -> Any:
        encoded.extend(texts)
        if len(encoded) > 300 and len(encoded) < 10_000:
            raise KeyboardInterrupt  # as a kill would end it, in the middle of a part
        return real(self, texts)

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        making.both(corpus, 0.2)
    parts = sorted((tmp_path / "tokens").glob("*-parts/part-*.npz"))
    documents = sum(len(np.load(part)["held_out"]) for part in parts)
    assert documents > 100
    parts[-1].write_bytes(parts[-1].read_bytes()[:100])  # one that was not whole counts as absent
    lost = documents - sum(len(np.load(part)["held_out"]) for part in parts[:-1])
    encoded[:] = ["x"] * 10_000
    train, held = making.both(corpus, 0.2)
    total = len(list(corpus.all_documents()))
    assert len(encoded) - 10_000 == total - documents + lost
    monkeypatch.undo()
    rows = straight(corpus, encoder, 0.2)
    assert train.tokens.tolist() == [i for ids, held_out in rows if not held_out for i in ids]
    assert held.tokens.tolist() == [i for ids, held_out in rows if held_out for i in ids]
    assert not list((tmp_path / "tokens").glob("*-parts*"))


def test_a_stop_keeps_the_parts_and_an_error_before_the_first_leaves_nothing(
    corpus: Corpus, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PART_CHARACTERS", 3000)
    asked = iter(range(10**9))
    making = Making(tmp_path / "tokens", encoder, lambda _: None, lambda: next(asked) > 200, check=True)
    with pytest.raises(Preempted):
        making.both(corpus, 0.2)
    assert list((tmp_path / "tokens").glob("*-parts/part-*.npz"))
    early = Making(tmp_path / "early", encoder, lambda _: None, lambda: True, check=True)
    with pytest.raises(Preempted):
        early.both(corpus, 0.2)
    assert not list((tmp_path / "early").iterdir())


KILLED = """
import sys
from transformers import AutoTokenizer
from gqa_convert.data.documents import SourceSpec, open_corpus
from gqa_convert.data.encoding import Encoder
from gqa_convert.uptrain import tokenising
from gqa_convert.uptrain.making import Making
from pathlib import Path
tokenising.PART_CHARACTERS = 20000
corpus = open_corpus(SourceSpec(kind="jsonl", paths=(sys.argv[2],)))
making = Making(Path(sys.argv[3]), Encoder(AutoTokenizer.from_pretrained(sys.argv[1])), print, lambda: False, True, 2)
train, held = making.both(corpus, 0.1)
print(train.digest, held.digest)
"""


@pytest.mark.slow
def test_killed_with_its_helpers_and_started_again_it_gives_the_same_store(
    text_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    lines = text_file.read_text().splitlines()
    large = tmp_path / "large.jsonl"
    large.write_text("".join(json.dumps({"text": f"{json.loads(x)['text']} {i}"}) + "\n"
                             for i in range(60) for x in lines))  # fmt: skip
    arguments = [sys.executable, "-c", KILLED, str(tiny_folder), str(large)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    straight_through = subprocess.run(
        [*arguments, str(tmp_path / "a")], env=environment, capture_output=True, text=True, check=True
    )
    killed = subprocess.Popen([*arguments, str(tmp_path / "b")], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "b").glob("*-parts/part-*.npz"))) < 4:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "b").glob("*-parts/part-*.npz")}
    again = subprocess.run(
        [*arguments, str(tmp_path / "b")], env=environment, capture_output=True, text=True, check=True
    )
    assert again.stdout.splitlines()[-1] == straight_through.stdout.splitlines()[-1]
    assert len(kept) >= 4
