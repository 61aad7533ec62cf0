"""Runs on conversations and on mixtures of sources, from the command line's configuration to the curves."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from gqa_convert.data.batches import MicroBatch, StepBatches
from gqa_convert.data.blocks import Block
from gqa_convert.data.mixture import Mixture
from gqa_convert.errors import Preempted, UsageError
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain.corpus import prepare_data
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import parse_config
from tests.support import Command
from tests.uptrain.conftest import WORDS, make_tiny
from tests.uptrain.test_run import check_resumed, run, stop_after

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny(tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every answer repeats the question: something to learn, and the question nothing to learn from."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "chat.jsonl"
    with open(path, "w") as file:
        for _ in range(300):
            messages = []
            for _ in range(draw.randrange(1, 3)):
                said = draw.choice(WORDS)
                messages += [{"role": "user", "content": said}, {"role": "assistant", "content": f"{said} {said}"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def mixed(settings: dict[str, Any], text_file: Path, tmp_path: Path) -> dict[str, Any]:
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": f"cat {WORDS[i % 20]} {WORDS[i // 20]} fish"}) + "\n" for i in range(200))
    )
    settings["data"] |= {
        "source": None,
        "sources": [
            {"source": str(text_file), "weight": 0.75},
            {"source": str(other), "weight": 0.25, "name": "cats"},
        ],
    }
    settings["evaluation"] = {"every_tokens": 512, "sets": {"again": str(other)}}
    return settings


def test_a_run_on_conversations_learns_the_assistants_turns(
    settings: dict[str, Any], chat_folder: Path, chat_file: Path
) -> None:
    settings["model"] = str(chat_folder)
    settings["data"] |= {"source": str(chat_file), "held_out_fraction": 0.2, "separate_documents": True}
    settings["budget"] = {"steps": 60}
    settings["schedule"]["peak"] = 0.03
    settings["evaluation"] = {"sets": {"whole": str(chat_file)}}
    result = run(settings)
    assert result.loss_after < 0.6 * result.loss_before
    records = read_metrics(Path(settings["output"]) / "metrics.jsonl")
    assert {"held_out_loss/whole", "held_out_loss"} <= set(next(r for r in records if r["kind"] == "evaluation"))


def test_conversations_without_a_template_are_refused_before_training(
    settings: dict[str, Any], chat_file: Path
) -> None:
    settings["data"]["source"] = str(chat_file)
    with pytest.raises(UsageError, match="no chat template"):
        run(settings)


def test_conversations_stay_whole_in_a_block_and_apart(
    settings: dict[str, Any], chat_folder: Path, chat_file: Path
) -> None:
    config = parse_config(settings | {"model": str(chat_folder), "data": settings["data"] | {
        "source": str(chat_file)}})  # fmt: skip
    source = Source.open(chat_folder)
    for streaming in (False, True):
        config = config.model_copy(update={"data": config.data.model_copy(update={"streaming": streaming})})
        data = prepare_data(config, source.tokenizer(), source.config)
        unknown = source.tokenizer().unk_token_id  # `user` and `assistant` are no words of its vocabulary
        for index in range(40):
            batch = data.collate([(index, data.blocks.get(index), 1 << 62)])
            ids, positions = batch.inputs["input_ids"][0].tolist(), batch.inputs["position_ids"][0].tolist()
            starts = [i for i, at in enumerate(positions) if at == 0]
            assert all(ids[i] == unknown for i in starts)  # each begins at its beginning, or is padding
            assert batch.valid > 0


def test_show_data_and_dry_run_tell_what_is_learnt(
    settings: dict[str, Any], chat_folder: Path, chat_file: Path, write_config: Callable[..., Path], command: Command
) -> None:
    settings["model"] = str(chat_folder)
    settings["data"]["source"] = str(chat_file)
    path = write_config(settings)
    shown = json.loads(command("gqa", "uptrain", "show-data", path, "--json").out)["documents"][0]
    assert shown["kind"] == "conversation"
    assert [t for t, learnt in zip(shown["tokens"], shown["learnt"], strict=True) if learnt][-1] == "</s>"
    assert 0 < sum(shown["learnt"]) < len(shown["ids"])
    planned = command("gqa", "uptrain", path, "--dry-run", "--json")
    assert "of the first conversation's" in json.loads(planned.out)["learns"]["learns"]
    assert "[" in command("gqa", "uptrain", "show-data", path).out


def test_eval_scores_the_assistants_turns(
    chat_folder: Path, chat_file: Path, tiny_folder: Path, command: Command
) -> None:
    of_turns, of_all = (
        json.loads(command("gqa", "eval", chat_folder, "--data", chat_file, "--loss-on", which, "--json",
                           "--max-windows", 50).out) for which in ("assistant", "all")
    )  # fmt: skip
    assert of_turns["windows"] == of_all["windows"] == 50
    assert of_turns["tokens"] < of_all["tokens"]
    assert of_turns["task"] == "assistant's turns"
    refused = command("gqa", "eval", tiny_folder, "--data", chat_file)
    assert refused.code == 2
    assert "no chat template" in refused.err
    assert command("gqa", "eval", chat_folder, "--data", chat_file, "--loss-on", "user").code == 2


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_a_mixture_stopped_and_resumed_is_bitwise_the_same(
    mixed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    mixed["data"]["streaming"] = streaming
    run(mixed)
    check_resumed(mixed, tmp_path / "resumed", monkeypatch)


def test_every_set_has_its_curve_and_the_originals_line(mixed: dict[str, Any], teacher_folder: Path) -> None:
    mixed["evaluation"]["reference"] = str(teacher_folder)
    run(mixed)
    evaluations = [r for r in read_metrics(Path(mixed["output"]) / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert len(evaluations) > 2
    for record in evaluations:
        named = {key for key in record if key.startswith("held_out_loss/")}
        assert named == {"held_out_loss/text", "held_out_loss/cats", "held_out_loss/again"}
        assert {key.replace("held_out_loss", "reference_loss") for key in named} <= set(record)
        low, high = sorted(record[f"held_out_loss/{name}"] for name in ("text", "cats"))
        assert low <= record["held_out_loss"] <= high
    told = json.loads((Path(mixed["output"]) / "final" / "gqa_convert.json").read_text())["uptraining"]
    assert [entry["name"] for entry in told["config"]["data"]["sources"]] == ["text", "cats"]


def test_a_source_that_changed_is_named(mixed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 5)
    with pytest.raises(Preempted):
        run(mixed)
    monkeypatch.undo()
    path = Path(mixed["data"]["sources"][1]["source"])
    path.write_text(path.read_text() * 2)
    with pytest.raises(UsageError, match="the text of cats to train on"):
        run(mixed)


def test_any_number_of_processes_reads_the_same_blocks_in_proportion() -> None:
    """Over 10,000 blocks; what each step's processes read together is what one would read."""
    mixture = Mixture([0.6, 0.3, 0.1])

    class Located:
        def get(self, index: int) -> Block:
            source, inside = mixture.locate(index)
            return Block(np.array([source, inside]), np.zeros(2, np.int64))

    def collate(blocks: Any) -> MicroBatch:
        return MicroBatch({}, torch.from_numpy(np.stack([block.ids for _, block, _ in blocks])))

    def read(processes: int, first: int, steps: int) -> list[list[tuple[int, ...]]]:
        seen = []
        for rank in range(processes):
            batches: Any = StepBatches(
                cast(Any, Located()), collate, sequences=8, micro=2, processes=processes, rank=rank,
            )  # fmt: skip
            seen.append([batches.step(number) for number in range(first, first + steps)])
            batches.close()
        return [
            sorted(tuple(row) for rank in seen for part in rank[i] for row in part.labels.tolist())
            for i in range(steps)
        ]

    one = read(1, 0, 1250)
    assert one == read(2, 0, 1250)
    assert one[700:720] == read(2, 700, 20)  # as after a kill
    shares = np.bincount([source for step in one for source, _ in step], minlength=3) / 10_000
    assert np.abs(shares - [0.6, 0.3, 0.1]).max() < 0.005


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"source": "a.txt"}, "give one `source`, or several"),
        ({"sources": []}, "give one `source`, or several"),
        ({"sources": [{"source": {"kind": "text", "paths": ["a"]}, "weight": 0}]}, "weight"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(
    mixed: dict[str, Any], text_file: Path, change: dict[str, Any], problem: str
) -> None:
    if "source" in change:
        change = {"source": str(text_file)}
    mixed["data"] |= change
    with pytest.raises(UsageError, match=problem):
        parse_config(mixed)
