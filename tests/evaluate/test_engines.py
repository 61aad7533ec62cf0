"""The decode benchmark in engines: transformers in a child here; the others with `-m clients` and GQA_CLIENTS."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.cli.main import app
from gqa_convert.conversion.execute import convert
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.evaluate.decode.results import Bench, conclusions
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.engines.bench import _read_share, bench_engine
from gqa_convert.evaluate.engines.known import ENGINES
from gqa_convert.evaluate.engines.process import EngineFailed, EngineProcess, find_python
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config
from tests.evaluate.tiny import write_tokenizer

PER_TOKEN = 2 * 2 * 4 * 8 * 4  # keys and values, layers, heads, head_dim, float32
SETTINGS = BenchSettings(batches=(1, 2), contexts=(16, 100), steps=2, rounds=2, cache_memory=40 * PER_TOKEN)
ENVIRONMENTS = {"llama.cpp": "llamacpp", "openvino": "openvino", "ctranslate2": "clients", "vllm": "vllm"}


@pytest.fixture(scope="module")
def measured(llama: Path, llama_gqa2: Path) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gqa_convert.evaluate.engines.bench.read_bandwidth", lambda device: 1e10)
        patch.setattr("gqa_convert.evaluate.engines.bench._SETTLE_S", 0.0)
        patch.setattr("gqa_convert.evaluate.engines.bench.MOST_REQUESTS", 3)
        return bench_engine([llama, llama_gqa2], "transformers", SETTINGS)


def test_transformers_in_a_process_of_its_own(measured: Bench) -> None:
    assert measured.engine_version.startswith("transformers 5")
    assert "read from the engine" in measured.cache_source
    assert [(point.batch, point.context) for point in measured.points] == [(1, 16), (2, 16), (1, 100), (2, 100)]
    assert {point.skipped for point in measured.points[2:]} == {"tiny-llama is made for 64 tokens"}
    for point in measured.points[:2]:
        base, made = point.models
        assert base.cache_bytes == point.batch * 16 * PER_TOKEN
        assert made.cache_ratio == 0.5
        assert made.time_ratio is not None
        assert base.prefill_seconds is not None
        read = measured.weights_read[base.name]
        assert base.floor_seconds == pytest.approx((read + base.cache_bytes) / measured.bandwidth)
    assert measured.weights["tiny-llama"] - measured.weights_read["tiny-llama"] == 259 * 32 * 4, "one row of embedding"


def test_fixed_memory_holds_twice_the_requests_with_half_the_heads(measured: Bench) -> None:
    assert [(each.name, each.requests, each.run) for each in measured.throughputs] == [
        ("tiny-llama", 2, 2),  # 18 tokens each of 40
        ("tiny-llama-gqa2", 4, 3),  # the most that are run, here
    ]
    assert all(each.tokens_per_second for each in measured.throughputs)
    wanted = "3 requests of 16 tokens at a time (no more were run) where tiny-llama has 2"
    assert any(wanted in line for line in conclusions(measured))


def test_command_line_and_page(
    llama: Path, llama_gqa2: Path, measured: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "gqa_convert.evaluate.engines.bench.bench_engine", lambda *a, **k: asked.append((a, k)) or measured
    )
    out = tmp_path / "run" / "bench.json"
    out.parent.mkdir()
    arguments = ["bench", str(llama), str(llama_gqa2), "--engine", "transformers", "--engine-python", sys.executable]
    arguments += ["--batch", "1,2", "--cache-context", "16,100", "--steps", "2", "--rounds", "2"]
    arguments += ["--cache-memory", str(40 * PER_TOKEN), "--dtype", "fp32"]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    (folders, engine, settings), more = asked[0]
    assert (folders, engine, settings) == ([str(llama), str(llama_gqa2)], "transformers", SETTINGS)
    assert (more["python"], more["dtype"]) == (sys.executable, "fp32")
    for part in ("transformers float32 cache", "2 requests of 16 tokens at a time in 20.0 KiB of cache", "its tensors"):
        assert part in " ".join(shown.output.split())
    assert json.loads(out.read_text())["engine"] == "transformers"
    paged = CliRunner().invoke(app, ["report", str(out.parent)])
    assert paged.exit_code == 0, paged.output
    page = "".join(page.read_text() for page in out.parent.rglob("*.html"))
    assert "--engine=transformers --cache-memory 20480" in page
    assert "transformers float32, batch 1, context 16" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "tgi"], "--engine tgi: choose one of"),
        (["--engine", "ctranslate2"], "this Python has no ctranslate2. Name one that has by --engine-python"),
        (["--engine", "vllm", "--engine-python", "/nowhere/python"], "/nowhere/python: cannot be run"),
        (["--engine-python", "python"], "--engine-python: goes with --engine"),
        (["--cache-memory", "1MiB"], "--cache-memory: goes with --engine"),
        (["--engine", "transformers", "--cache", "fp8"], "--cache: an engine has its own way"),
        (["--engine", "transformers", "--device", "cuda"], "--device: an engine has its own way"),
    ],
)
def test_what_does_not_go_is_refused_in_a_line(llama: Path, arguments: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, ["bench", str(llama), *arguments])
    assert isinstance(refused.exception, UsageError)
    assert message in str(refused.exception)


FAKE = """
import json, sys
if sys.argv[1] == "-c":
    sys.exit()
for line in sys.stdin:
    loaded = {"version": "fake 1", "cache": "made up", "dtype": "f", "cache_dtype": "f", "weight_bytes": 100}
    print(json.dumps(loaded if json.loads(line)["do"] == "load" else {"error": "ValueError: no luck"}), flush=True)
"""


def fake_python(folder: Path, script: str) -> str:
    """A `python` that runs a script, whatever it is asked to run."""
    (folder / "fake.py").write_text(script)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {folder / "fake.py"} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_an_engine_that_can_time_nothing_is_an_error(llama: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, FAKE)
    with pytest.raises(UnsupportedModelError, match=r"nothing could be timed \(ValueError: no luck\)"):
        bench_engine([llama], "vllm", BenchSettings(batches=(1,), contexts=(8,)), python=python)
    refuses = fake_python(tmp_path, FAKE.replace('== "load"', '== "nothing"'))
    with pytest.raises(UnsupportedModelError, match=r"tiny-llama: vllm does not take it \(ValueError: no luck\)"):
        bench_engine([llama], "vllm", BenchSettings(batches=(1,), contexts=(8,)), python=refuses)
    with pytest.raises(UsageError, match="--cache-context 100: tiny-llama is made for 64 tokens"):
        bench_engine([llama], "vllm", BenchSettings(batches=(1,), contexts=(100,)), python=python)


def test_a_process_that_dies_says_what_it_last_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    python.chmod(0o755)
    with EngineProcess(ENGINES["vllm"], str(python), threads=1) as process, pytest.raises(EngineFailed) as failed:
        process.ask("load", folder="x")
    assert "exit code 3" in str(failed.value)
    assert "out of luck" in str(failed.value)
    with pytest.raises(UsageError, match=r"is no Python that runs \(out of luck"):
        find_python(ENGINES["vllm"], str(python))


def test_an_answer_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 60\n")
    python.chmod(0o755)
    process = EngineProcess(ENGINES["vllm"], str(python), threads=1)
    with pytest.raises(EngineFailed, match="no answer in 0 s"):
        process.ask("load", limit_s=0.2)
    assert process._running.poll() is not None, "ended"
    process.close()


def test_of_experts_those_chosen_are_read(tmp_path: Path) -> None:
    config = tiny_config("mixtral", num_heads=4, num_kv_heads=4)
    config.num_local_experts, config.num_experts_per_tok, config.tie_word_embeddings = 4, 1, True
    torch.manual_seed(0)
    tiny_model(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    sizes = {key: info.nbytes for key, info in checkpoint.tensors.items()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert _read_share(checkpoint) == pytest.approx((sum(sizes.values()) - 0.75 * experts) / sum(sizes.values()))


@pytest.mark.clients
@pytest.mark.parametrize("engine", ENVIRONMENTS)
def test_an_engine_of_its_own_environment(engine: str, tmp_path: Path) -> None:
    if "GQA_CLIENTS" not in os.environ:
        pytest.skip("GQA_CLIENTS is not set; see scripts/clients/setup.sh")
    python = Path(os.environ["GQA_CLIENTS"]).absolute() / ENVIRONMENTS[engine] / "bin" / "python"
    config = LlamaConfig(
        vocab_size=259, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    source = tmp_path / "mha"
    LlamaForCausalLM(config).save_pretrained(source)
    write_tokenizer(source)
    made = convert(source, groups=2, out=tmp_path / "gqa2").out
    settings = BenchSettings(batches=(1, 4), contexts=(1024,), steps=3, rounds=2, cache_memory=16 << 20)
    found = bench_engine([source, made], engine, settings, python=str(python), dtype="float32")
    for point in found.points:
        assert not point.skipped
        base, small = point.models
        assert base.seconds.median > 0
        if engine != "ctranslate2":  # which keeps a copy per query head, and whose figure is the process's memory
            assert base.cache_bytes == pytest.approx(point.batch * 1024 * 2 * 2 * 256 * 4, rel=0.02)
            assert small.cache_ratio == pytest.approx(0.25, abs=0.01)
    if engine != "ctranslate2":
        assert [each.requests for each in found.throughputs] == pytest.approx([3, 15], abs=1)
