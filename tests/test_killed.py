"""Killed with SIGKILL at random moments: the target is whole or not there, and the next run cleans up."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard
from gqa_convert.cli.signals import stopped_by_signals
from gqa_convert.errors import Preempted
from tests.support import tree

HIDDEN, HEADS = 512, 8

Run = Callable[[Path, Path, bool, float | None], int]
"""(source, out, force, seconds until it is killed or None) -> exit status."""


def make_source(folder: Path, megabytes: int) -> Path:
    """A Llama of about that size in four shards, written quickly: every layer is the same."""
    layer_bytes = 2 * HIDDEN * HIDDEN * 7
    layers = max(1, megabytes * 10**6 // layer_bytes)
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (64, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            shapes[f"model.layers.{i}.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("input", "post_attention"):
            shapes[f"model.layers.{i}.{name}_layernorm.weight"] = (HIDDEN,)
    drawn = {shape: torch.randn(shape).bfloat16() for shape in set(shapes.values())}
    weight_map: dict[str, str] = {}
    for number in range(4):
        name = f"model-{number + 1:05d}-of-00004.safetensors"
        part = list(shapes.items())[number::4]
        tensors = [
            TargetTensor(key=key, dtype="BF16", shape=shape, produce=partial(drawn.__getitem__, shape))
            for key, shape in part
        ]
        write_shard(folder / name, tensors, {"format": "pt"}, sync=False)
        weight_map.update({key: name for key, _ in part})
    write_index(folder / "model.safetensors.index.json", weight_map, 0, 0)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Names and hashes of a folder's files, without the lock that a run removes as its last act."""
    return {name: digest for name, (digest, _) in tree(folder).items() if name != ".lock"}


class Worker:
    """Conversions in forks of one process that has imported everything already."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("convert_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, source: Path, out: Path, force: bool, seconds: float | None) -> int:
        """Convert; kill it after `seconds` if given. Returns the exit status, -9 if killed."""
        assert self.process.stdin is not None
        wanted = {"source": str(source), "out": str(out), "groups": 2, "force": force}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        child = int(self._answer())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(int(self._answer()))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def run_command(source: Path, out: Path, force: bool, seconds: float | None) -> int:
    """Convert by the command line in a process of its own; otherwise as `Worker.run`."""
    arguments = [str(source), "--groups", "2", "--out", str(out), *(["--force"] if force else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "gqa_convert.cli", "convert", *arguments], stdout=subprocess.DEVNULL
    )
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    return process.wait()


def check(run: Run, source: Path, *, kills: int, seed: int, force: bool) -> int:
    """Kill runs at moments spread over their life and look at what is there; return how many were cut short.

    With `force` every run replaces the output of an earlier one, else it makes a new one.
    """
    out, before = source.with_name("out"), contents(source)
    started = time.monotonic()
    assert run(source, out, False, None) == 0
    life, whole = time.monotonic() - started, contents(out)
    draw = random.Random(seed)
    cut_short = 0
    for _ in range(kills):
        if not force:
            shutil.rmtree(out, ignore_errors=True)
        cut_short += run(source, out, force, draw.uniform(0, 1.1 * life)) == -signal.SIGKILL
        assert not out.exists() or contents(out) == whole
        strays = {path.name for path in source.parent.iterdir()} - {"source", "out"}
        assert all(name.startswith((".out.tmp-", ".out.old-")) for name in strays)
    assert run(source, out, True, None) == 0
    assert contents(out) == whole
    assert {path.name for path in source.parent.iterdir()} == {"source", "out"}
    assert contents(source) == before
    return cut_short


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("force", [False, True], ids=["new", "replacing"])
def test_five_kills_leave_nothing_half_done(force: bool, worker: Worker, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", 30)
    assert check(worker.run, source, kills=5, seed=1, force=force) >= 1


def test_a_signal_to_stop_is_answered_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source", 400), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "gqa_convert.cli", "convert", source, "--groups", "2", "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(tmp_path.glob(".out.tmp-*/*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate()
    assert process.returncode == 75, said
    assert printed == ""
    assert said.splitlines()[-1].startswith("error: stopped by SIGTERM: nothing was left at --out")
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_handlers_come_back_and_what_is_ignored_stays_ignored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=number.name), stopped_by_signals():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("seed", range(3))
def test_many_kills(seed: int, force: bool, worker: Worker, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", 60)
    assert check(worker.run, source, kills=60, seed=seed, force=force) >= 20


@pytest.mark.slow
def test_thirty_kills_of_the_command(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", 200)
    assert check(run_command, source, kills=30, seed=3, force=False) >= 10
