import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from gqa_convert.budget.counts import parse_bytes, parse_counts
from gqa_convert.cli.main import app
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.evaluate.decode.bench import bench
from gqa_convert.evaluate.decode.caches import filled_cache
from gqa_convert.evaluate.decode.contender import Contender, load_contenders
from gqa_convert.evaluate.decode.decoder import Decoder
from gqa_convert.evaluate.decode.device import peak_memory, read_bandwidth
from gqa_convert.evaluate.decode.results import Bench, DecodeResult, Point, Spread, conclusions, verdict
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.decode.weights import bytes_read_per_step, weight_bytes
from gqa_convert.evaluate.models import cache_bytes
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config

BYTES_PER_TOKEN = 2 * 2 * 4 * 8 * 4  # keys and values, layers, heads, head_dim, float32


@pytest.fixture(autouse=True)
def _known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.evaluate.decode.bench.read_bandwidth", lambda device: 1e10)


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_filled_cache_holds_what_it_says(model: torch.nn.Module, kind: str) -> None:
    cache = filled_cache(model, kind=kind, batch=3, context=20, room=5 if kind == "static" else 0)
    assert int(cache.get_seq_length()) == 20
    assert cache_bytes(cache) == 3 * (25 if kind == "static" else 20) * BYTES_PER_TOKEN
    assert float(cache.layers[0].keys[:, :, :20].abs().min(-1).values.max()) > 0


def test_both_caches_compute_the_same_step(model: torch.nn.Module) -> None:
    ids = torch.full((2, 1), 3)
    with torch.inference_mode():
        logits = [
            model(input_ids=ids, past_key_values=filled_cache(model, kind=kind, batch=2, context=9, room=4)).logits
            for kind in ("dynamic", "static")
        ]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_round_leaves_the_cache_where_it_was(model: torch.nn.Module, kind: str) -> None:
    decoder = Decoder(model, cache_kind=kind, mode="eager", batch=2, context=16, steps=3)
    decoder.build()
    before = decoder.cache_bytes
    for _ in range(3):
        assert decoder.seconds_per_step() > 0
    assert decoder.cache_bytes == before
    assert int(decoder._cache.get_seq_length()) == 16
    decoder.drop()


def test_bench_measures_cache_exactly(llama: Path, llama_gqa2: Path) -> None:
    seen: list[Point] = []
    settings = BenchSettings(batches=(1, 2), contexts=(16,), steps=2, rounds=2, memory=1 << 20)
    measured = bench(load_contenders([llama, llama_gqa2]), settings, on_point=seen.append)
    assert len(measured.points) == len(seen) == 4
    for point in measured.points:
        base, converted = point.models
        assert converted.cache_ratio == 0.5
        assert base.cache_bytes == point.batch * (16 if point.cache == "dynamic" else 19) * BYTES_PER_TOKEN
        assert (base.verdict, base.time_ratio) == ("base", None)
        assert converted.time_ratio is not None
        assert base.floor_seconds == pytest.approx(
            (measured.weights_read[base.name] + base.cache_bytes) / measured.bandwidth
        )
        assert base.peak_bytes is None or base.peak_bytes >= measured.weights[base.name] + base.cache_bytes
    assert measured.points[0].models[0].prefill_seconds is not None
    capacity = measured.capacities[0]
    assert capacity.sequences == ((1 << 20) - measured.weights[capacity.name]) // (16 * BYTES_PER_TOKEN)
    assert json.loads(json.dumps(measured.to_json()))["conclusions"] == conclusions(measured)


def test_sliding_windows_are_rebuilt() -> None:
    torch.manual_seed(0)
    config = tiny_config("mistral", num_heads=4, num_kv_heads=4)
    config.sliding_window = 8
    sliding = AutoModelForCausalLM.from_config(config).eval()
    decoder = Decoder(sliding, cache_kind="dynamic", mode="eager", batch=1, context=20, steps=2)
    decoder.build()
    before = decoder.cache_bytes
    decoder.seconds_per_step()
    assert decoder.cache_bytes == before


def test_weights_read_leave_out_an_untied_embedding(model: torch.nn.Module) -> None:
    assert weight_bytes(model) - bytes_read_per_step(model) == 259 * 32 * 4


def test_models_without_such_a_cache_are_refused() -> None:
    latent = tiny_model(tiny_config("rwkv"))
    with pytest.raises(UnsupportedModelError, match="not keys and values"):
        filled_cache(latent, kind="dynamic", batch=1, context=2, room=0)


def test_what_does_not_fit_is_left_out(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.evaluate.decode.bench.available_memory", lambda device: 1 << 16)
    one = Contender(name="a", query_heads=4, kv_heads=4, model=model)
    measured = bench([one], BenchSettings(batches=(1, 64), contexts=(16,), caches=("dynamic",), steps=1, rounds=1))
    assert [bool(point.skipped) for point in measured.points] == [False, True]
    assert "does not fit" in measured.points[1].skipped


def test_caches_are_built_in_turn_where_not_all_fit(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    need = BYTES_PER_TOKEN * 17 * 1.25 / 0.8
    monkeypatch.setattr("gqa_convert.evaluate.decode.bench.available_memory", lambda device: int(need * 1.5))
    two = [Contender(name=name, query_heads=4, kv_heads=4, model=model) for name in "ab"]
    measured = bench(two, BenchSettings(batches=(1,), contexts=(16,), caches=("dynamic",), steps=1, rounds=2))
    assert [len(point.models) for point in measured.points] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caches": ("paged",)}, "--cache paged"),
        ({"mode": "fast"}, "--mode fast"),
        ({"mode": "compile"}, "needs --cache static"),
        ({"rounds": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchSettings(**change)


def test_graphs_need_a_gpu_and_names_must_differ(model: torch.nn.Module) -> None:
    one = Contender(name="a", query_heads=4, kv_heads=4, model=model)
    with pytest.raises(UsageError, match="CUDA"):
        bench([one], BenchSettings(mode="graph", caches=("static",)))
    with pytest.raises(UsageError, match="two models are called a"):
        bench([one, one], BenchSettings())


@pytest.mark.parametrize(
    ("ratio", "word"),
    [((0.5, 0.4, 0.6), "faster"), ((0.9, 0.7, 1.01), "no difference"), ((1.2, 1.1, 1.3), "slower")],
)
def test_verdict_needs_the_quartiles_clear_of_one(ratio: tuple[float, float, float], word: str) -> None:
    assert verdict(Spread(*ratio)) == word


def test_conclusions_say_where_nothing_is_gained() -> None:
    def result(name: str, ratio: float | None, cache: int) -> DecodeResult:
        spread = None if ratio is None else Spread(ratio, ratio, ratio)
        return DecodeResult(
            name=name, query_heads=8, kv_heads=8 if ratio is None else 2, seconds=Spread(1, 1, 1), tokens_per_second=1,
            cache_bytes=cache, cache_ratio=1, step_bytes=0, peak_bytes=0, floor_seconds=0.5, floor_share=0.5,
            time_ratio=spread, floor_ratio=0.4, prefill_seconds=None, prefill_ratio=spread,
            verdict="base" if spread is None else verdict(spread),
        )  # fmt: skip

    points = (
        Point(batch=1, context=64, cache="static", mode="eager", models=(result("m", None, 10), result("g", 1.0, 3))),
        Point(batch=8, context=64, cache="static", mode="eager", models=(result("m", None, 90), result("g", 0.5, 30))),
    )
    bench_found = Bench(
        device="d", dtype="float32", bandwidth=1, steps=1, rounds=1, versions={}, weights={"m": 90}, points=points,
        weights_read={"m": 90},
    )  # fmt: skip
    lines = conclusions(bench_found)
    assert (
        "faster at 1 of 2 points, most at batch 8, context 64: x 2.00 (memory traffic alone would allow x 2.50)"
        in lines[0]
    )
    assert "gives nothing in decode time at batch 1, context 64" in lines[1]
    assert "10% of the bytes a step reads" in lines[1]
    assert "x 0.50 to x 1.00" in lines[2]


def test_device_meters() -> None:
    device = torch.device("cpu")
    with peak_memory(device) as peak:
        torch.ones(512 << 20, dtype=torch.uint8)  # too large for malloc to serve from memory it already holds
    assert peak.bytes is None or peak.bytes > 64 << 20
    assert read_bandwidth(device, repeats=1) > 1e8


def test_numbers_as_people_type_them() -> None:
    assert parse_counts("512,2k,512", "--context") == (512, 2048)
    assert [parse_bytes(text, "--memory") for text in ("1GiB", "1.5k", "7", "2 mb")] == [1 << 30, 1536, 7, 2 << 20]
    for text in ("0", "a", "1,,2"):
        with pytest.raises(UsageError, match="--batch"):
            parse_counts(text, "--batch")
    with pytest.raises(UsageError, match="not a size"):
        parse_bytes("much", "--memory")


def test_command_line(llama: Path, llama_gqa2: Path, tmp_path: Path) -> None:
    args = [
        "bench",
        str(llama),
        str(llama_gqa2),
        "--batch",
        "1",
        "--cache-context",
        "16",
        "--steps",
        "1",
        "--rounds",
        "2",
    ]
    shown = CliRunner().invoke(app, [*args, "--memory", "1MiB"])
    assert shown.exit_code == 0, shown.output
    for part in ("cache, measured", "(x 0.5)", "sequences of 16 tokens fit", "verdict"):
        assert part in shown.output
    finished = CliRunner().invoke(app, [*args, "--cache", "dynamic", "--json", "--out", str(tmp_path / "bench.json")])
    assert json.loads(finished.stdout)["kind"] == "bench"
    assert (tmp_path / "bench.json").is_file()


@pytest.mark.slow
def test_compiled_steps_run(model: torch.nn.Module) -> None:
    decoder = Decoder(model, cache_kind="static", mode="compile", batch=1, context=8, steps=2)
    decoder.build()
    assert decoder.seconds_per_step() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile", "graph"])
def test_every_mode_on_a_gpu(llama: Path, llama_gqa2: Path, mode: str) -> None:
    settings = BenchSettings(batches=(2,), contexts=(16,), caches=("static",), mode=mode, steps=2, rounds=2)
    measured = bench(load_contenders([llama, llama_gqa2], device="cuda"), settings)
    assert measured.points[0].models[1].cache_ratio == 0.5


def test_dynamic_cache_is_transformers_own(model: torch.nn.Module) -> None:
    assert isinstance(filled_cache(model, kind="dynamic", batch=1, context=2, room=0), DynamicCache)
