"""Streaming runs: what is held out of a stream, and streams dealt out to processes."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gqa_convert.data.strided import StridedBlocks
from gqa_convert.errors import UsageError
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain.corpus import prepare_data
from gqa_convert.uptrain.read_config import parse_config
from tests.uptrain.conftest import WORDS
from tests.uptrain.test_run import check_resumed, run


@pytest.fixture
def streamed(settings: dict[str, Any], text_file: Path, tmp_path: Path) -> dict[str, Any]:
    lines = text_file.read_text().splitlines()
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jsonl").write_text("\n".join(lines[number::5]) + "\n")
    settings["data"] |= {"source": str(folder), "streaming": True, "window": 8}
    return settings


def test_a_dealt_out_run_stopped_and_resumed_is_bitwise_the_same(
    streamed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(streamed)
    state = json.loads((Path(streamed["output"]) / "checkpoints/step-00000020/state.json").read_text())
    assert state["data"]["count"] == 4  # of 5 shards, for steps of 4 sequences
    assert len(state["data"]["streams"]) == 4
    check_resumed(streamed, tmp_path / "resumed", monkeypatch)


def test_streams_that_do_not_divide_a_step_are_refused(streamed: dict[str, Any]) -> None:
    streamed["data"]["streams"] = 3
    with pytest.raises(UsageError, match=r"data\.streams=3: must divide train\.batch_sequences=4"):
        run(streamed)


def test_a_shard_that_is_held_out_is_read_as_far_as_it_is_used_and_never_trained_on(
    streamed: dict[str, Any], tiny_folder: Path
) -> None:
    last = Path(streamed["data"]["source"]) / "4.jsonl"
    last.write_text("".join(json.dumps({"text": "stone stone stone"}) + "\n" for _ in range(10_000)))
    streamed["data"] |= {"held_out_by": "shard"}
    streamed["evaluation"] = {"tokens": 100}
    source = Source.open(tiny_folder)
    data = prepare_data(parse_config(streamed), source.tokenizer(), source.config)
    assert isinstance(data.blocks, StridedBlocks)
    stone = WORDS.index("stone") + 3
    (held,) = data.sets
    ids = [int(i) for block, real in held.blocks for i in block.ids[:real]]
    assert 100 <= len(ids) < 200
    assert set(ids) == {1, 2, stone}
    for index in range(100):
        words = [int(i) for i in data.blocks.get(index).ids]
        assert all(not (a == b == stone) for a, b in pairwise(words))


def test_one_shard_cannot_be_held_out_of_itself(settings: dict[str, Any]) -> None:
    settings["data"] |= {"streaming": True, "held_out_by": "shard"}
    with pytest.raises(UsageError, match="is a single shard"):
        run(settings)
