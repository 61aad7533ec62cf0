"""Damaged inputs of a run: one line that says what is wrong, or an older checkpoint; never other text or weights."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqa_convert.data.encoding import Encoder
from gqa_convert.data.store import StoreWriter
from gqa_convert.errors import (
    CheckpointError,
    GQAConvertError,
    OutputError,
    Preempted,
    TrainingAborted,
    UsageError,
)
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.checkpoints import MARKER, STATE, CheckpointStore
from gqa_convert.uptrain.faults import clear_faults
from gqa_convert.uptrain.loop import UptrainResult
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import apply_overrides, load_config, parse_config
from gqa_convert.uptrain.resume import unusable
from tests.uptrain.conftest import make_tiny, mark_again


def run(settings: dict[str, Any], **changes: Any) -> UptrainResult:
    merged = {**settings, **{key: {**settings.get(key, {}), **value} for key, value in changes.items()}}
    return loop.uptrain(parse_config(merged), quiet=True)


@pytest.fixture
def begun(settings: dict[str, Any]) -> Path:
    """A run of four steps with checkpoints at steps 2 and 4."""
    settings["checkpoints"] = {"every_steps": 2}
    settings["budget"] = {"steps": 4}
    run(settings)
    return Path(settings["output"])


@pytest.mark.parametrize(
    "marker",
    [
        "[]", "5", "null", '"text"', '{"files": 3}', '{"files": ["a"]}', '{"files": {"state.json": 5}}', "{}",
        '{"files": {"state.json": {"bytes": "many", "sha256": null}}}', "[" * 100_000, '{"files": {}}', "\0",
        '{"files": {"../step-00000002/state.json": {"bytes": 1, "sha256": ""}}}',
        '{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
    ],
)  # fmt: skip
def test_whatever_a_marker_holds_an_older_checkpoint_is_gone_on_from(begun: Path, marker: str) -> None:
    store = CheckpointStore(begun / "checkpoints", 2)
    (begun / "checkpoints" / "step-00000004" / MARKER).write_text(marker)
    told: list[str] = []
    assert store.newest(told.append, fault=unusable).step == 2
    assert len(told) == 1
    assert "trying an older checkpoint" in told[0]


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    "harm",
    ["pickle", "no-dictionary", "truncated", "absent", "not-safetensors", "state-list", "no-losses", "deep", "step"],
)
def test_what_cannot_be_resumed_falls_back_though_its_marker_fits(
    begun: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, harm: str
) -> None:
    monkeypatch.chdir(tmp_path)
    newest = begun / "checkpoints" / "step-00000004"
    optimizer, state = newest / "optimizer.pt", newest / STATE
    known = json.loads(state.read_text())
    damage: dict[str, Callable[[], object]] = {
        "pickle": lambda: torch.save({"state": Harm(), "param_groups": []}, optimizer),
        "no-dictionary": lambda: torch.save([1, 2], optimizer),
        "truncated": lambda: optimizer.write_bytes(optimizer.read_bytes()[:300]),
        "absent": optimizer.unlink,
        "not-safetensors": lambda: (newest / "model.safetensors").write_bytes(b"\xff" * 64),
        "state-list": lambda: state.write_text("[]"),
        "no-losses": lambda: state.write_text(json.dumps({**known, "losses": {"before": "small"}})),
        "deep": lambda: state.write_text('{"step":' + "[" * 100_000),
        "step": lambda: state.write_text(json.dumps({**known, "step": 3})),
    }
    damage[harm]()
    mark_again(newest)
    expected = load_file(begun / "final" / "model.safetensors")
    result = run(settings)
    assert not (tmp_path / "harmed").exists()
    resumed = [r["step"] for r in read_metrics(begun / "metrics.jsonl") if r.get("event") == "resumed"]
    assert resumed == [2]
    actual = load_file(result.folder / "model.safetensors")
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_the_same_lines_in_another_order_are_other_text(
    settings: dict[str, Any], tmp_path: Path, streaming: bool
) -> None:
    path = tmp_path / "text.jsonl"
    lines = Path(settings["data"]["source"]["paths"][0]).read_text().splitlines(keepends=True)
    path.write_text("".join(lines))
    data = {"source": {"kind": "jsonl", "paths": [str(path)]}, "streaming": streaming}
    run(settings, data=data, budget={"steps": 2})
    path.write_text("".join(reversed(lines)))
    with pytest.raises(UsageError, match=r"data: the text to train on .* when the checkpoint was written"):
        run(settings, data=data, budget={"steps": 4})
    path.write_text("".join(lines))  # the same again, of another time
    assert run(settings, data=data, budget={"steps": 4}).steps == 4


def test_a_stream_that_says_other_things_further_on_is_noticed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"streaming": True, "window": 64, "held_out_source": settings["data"]["source"], "held_out_fraction": 0.0}
    run(settings, data=data, budget={"steps": 17})
    monkeypatch.setattr("gqa_convert.data.documents.Corpus.contents", [])  # as of a hub dataset
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: [ids[::-1] for ids in real(self, texts)])
    with pytest.raises(UsageError, match="other tokens at the place"):
        run(settings, data=data, budget={"steps": 19})


def test_a_damaged_token_store_is_made_again(settings: dict[str, Any], begun: Path) -> None:
    expected = load_file(begun / "final" / "model.safetensors")
    tokens = next((begun / "tokens").glob("*-train")) / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[len(data) // 2] ^= 1  # within range, of another word
    tokens.write_bytes(data)
    shutil.rmtree(begun / "checkpoints")
    result = run(settings)
    assert tokens.read_bytes() != bytes(data)
    actual = load_file(result.folder / "model.safetensors")
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_what_a_killed_tokenisation_left_goes_and_what_is_being_written_stays(settings: dict[str, Any]) -> None:
    root = Path(settings["output"]) / "tokens"
    at_work = StoreWriter(root / f"{'a' * 16}-train", 100)
    left = root / f".{'b' * 16}-train.tmp-1-00000000"
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"half")
    empty = root / f".{'c' * 16}-held-out.tmp-1-00000000"
    empty.mkdir()
    foreign = root / ".somebody.tmp-1-00000000"
    foreign.mkdir()
    run(settings, budget={"steps": 1})
    assert not left.exists()
    assert not empty.exists()
    assert foreign.exists()
    assert at_work._stage.exists()
    at_work.discard()


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_a_signal_while_text_is_read_takes_effect_at_once(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    read = []

    def endless(self: Any) -> Iterator[str]:
        while True:
            read.append(1)
            if len(read) == 300:
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(read) < 10_000
            yield "the cat sees the dog"

    monkeypatch.setattr("gqa_convert.data.documents.ShardReader.__iter__", endless)
    with pytest.raises(Preempted, match="before training"):
        run(settings, data={"streaming": streaming})
    assert len(read) < 600
    assert not [path for path in (Path(settings["output"]) / "tokens").iterdir() if path.name.startswith(".")]


def test_a_kill_before_the_result_is_written_doubles_no_line(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    settings["evaluation"] = {"every_tokens": 640}
    monkeypatch.setattr(loop, "finish", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    monkeypatch.undo()
    run(settings)
    lines = (Path(settings["output"]) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))
    logged = [(r["kind"], r["step"]) for r in map(json.loads, lines)]
    assert logged.count(("evaluation", 20)) == 1
    assert [step for kind, step in logged if kind == "evaluation"] == [0, 5, 10, 15, 20]
    run(settings, budget={"steps": 25})  # what was the last evaluation is now one on the way
    steps = [r["step"] for r in read_metrics(Path(settings["output"]) / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert steps == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize("what", ["model", "teacher"])
@pytest.mark.parametrize("apart", [True, False])
def test_weights_that_are_no_numbers_are_called_what_they_are(
    settings: dict[str, Any], tmp_path: Path, what: str, apart: bool
) -> None:
    folder = make_tiny(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings["data"]["separate_documents"] = apart
    if what == "model":
        settings["model"] = str(folder)
    else:
        settings["objective"] = {"distillation": {"teacher": str(folder)}}
    with pytest.raises(CheckpointError, match=r"1 of the 1,536 values of .*up_proj.weight are NaN"):
        run(settings)


def test_a_place_for_the_result_that_is_not_ours_is_refused_before_training(settings: dict[str, Any]) -> None:
    final = Path(settings["output"]) / "final"
    final.mkdir(parents=True)
    (final / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="final"):
        run(settings)
    assert not (Path(settings["output"]) / "checkpoints").exists()
    assert (final / "thesis.txt").read_text() == "years of work"


def test_the_result_is_readable_as_umask_says(begun: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (begun / "final").iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("text", ["{}", "[]", "", "{", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none_is_one_line(settings: dict[str, Any], tmp_path: Path, text: str) -> None:
    folder = make_tiny(tmp_path / "broken")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(GQAConvertError, match="tokenizer") as caught:
        run({**settings, "model": str(folder)})
    assert "\n" not in str(caught.value)


def test_token_ids_that_the_model_does_not_know_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "short")
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["vocab"]["then"] = 500
    path.write_text(json.dumps(described))
    with pytest.raises(UsageError, match=r"token id 500, the model's vocabulary ends at 23"):
        run({**settings, "model": str(folder)})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_while_resuming_is_one_line(
    settings: dict[str, Any], begun: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(begun / "metrics.tmp"))

    monkeypatch.setattr("gqa_convert.uptrain.metrics.os.replace", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        run(settings)


def test_memory_that_does_not_suffice_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingAborted, match="micro_batch"), clear_faults(tmp_path):
        torch.empty(1 << 60, dtype=torch.uint8)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "a: &a [*a]", "[" * 3000, "{a: " * 3000, "a: !!python/name:os.system x", "a: 1\na: 2", "\0", "? [1]\n: 2",
     "budget: {steps: " + "9" * 5000 + "}", "&a {b: *a}"],
)  # fmt: skip
def test_yaml_that_means_harm_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(UsageError, match="not valid YAML"):
        load_config(path)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["fifo", "folder", "absent"])
def test_a_configuration_that_is_no_file_does_not_hang(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "fifo":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    with pytest.raises(UsageError, match=name):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("schedule", "peak", "1e400"), ("schedule", "peak", float("inf")), ("budget", "tokens", "1e400"),
     ("budget", "steps", 10**30), ("evaluation", "tokens", float("nan")), ("train", "batch_sequences", 2**70),
     ("data", "context", 2**62), ("data", "window", 2**50), ("train", "seed", -1), ("train", "seed", 2**80),
     ("guards", "spike_window", 2**70)],
)  # fmt: skip
def test_numbers_beyond_reason_are_refused_by_name(
    settings: dict[str, Any], section: str, key: str, value: float | str
) -> None:
    settings[section] = {**settings.get(section, {}), key: value}
    with pytest.raises(UsageError, match=rf"{section}\.{key}"):
        parse_config(settings)


def test_a_path_on_the_command_line_may_hold_a_hash(tmp_path: Path) -> None:
    given = ["output=/runs/try #2", "model=#1", "data.source='a # b'", "budget.steps=3", "data.cache=2024-01-01"]
    assert apply_overrides({}, given) == {
        "output": "/runs/try #2", "model": "#1", "budget": {"steps": 3},
        "data": {"source": "a # b", "cache": "2024-01-01"},
    }  # fmt: skip
