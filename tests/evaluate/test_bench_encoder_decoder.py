import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.cli.show_bench import show_bench
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.evaluate.decode.bench import bench
from gqa_convert.evaluate.decode.caches import cross_bytes_per_token, filled_cache
from gqa_convert.evaluate.decode.contender import Contender
from gqa_convert.evaluate.decode.decoder import Decoder, prefill_seconds
from gqa_convert.evaluate.decode.results import Point, conclusions
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.decode.weights import bytes_read_per_step, position_limit, weight_bytes
from gqa_convert.evaluate.models import cache_bytes, cross_cache_bytes, decoder_inputs, encoder_output
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config

FAMILIES = ("t5", "bart")
STEP = {"t5": "decoder.block", "bart": "decoder.layers"}


@pytest.fixture(autouse=True)
def _known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.evaluate.decode.bench.read_bandwidth", lambda device: 1e10)


def contender(family: str, kv_heads: int) -> Contender:
    model = tiny_model(tiny_config(family, num_heads=4, num_kv_heads=kv_heads))
    return Contender(name=f"{family}-{kv_heads}", query_heads=4, kv_heads=kv_heads, model=model)


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Contender]]:
    return {family: [contender(family, kv_heads) for kv_heads in (4, 2)] for family in FAMILIES}


def head_bytes(model: Any) -> int:
    """Keys and values of one head and token in all layers, float32."""
    config = model.config
    width = getattr(config, "d_kv", None) or config.d_model // 4
    layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
    return int(2 * layers * width * 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_caches_are_measured_apart_and_in_sum(pairs: dict[str, list[Contender]], family: str) -> None:
    seen: list[Point] = []
    settings = BenchSettings(
        batches=(1, 2),
        contexts=(8,),
        source_tokens=12,
        steps=2,
        rounds=2,
        memory=weight_bytes(pairs[family][0].model) * 2,
    )
    measured = bench(pairs[family], settings, on_point=seen.append)
    assert len(measured.points) == len(seen) == 4
    for point in measured.points:
        assert (point.skipped, point.source_tokens) == ("", 12)
        for one, kv_heads, source in zip(point.models, (4, 2), pairs[family], strict=True):
            token = head_bytes(source.model) * kv_heads * point.batch
            own = 8 if point.cache == "dynamic" else 8 + settings.steps + 1
            assert (one.self_cache_bytes, one.cross_cache_bytes) == (own * token, 12 * token)
            assert one.cache_bytes == one.self_cache_bytes + one.cross_cache_bytes
            read = measured.weights_read[one.name]
            assert one.floor_seconds == pytest.approx((read + one.cache_bytes) / measured.bandwidth)
        assert point.models[1].cache_ratio == 0.5
    assert measured.points[0].models[1].prefill_ratio is not None
    for capacity, pair in zip(measured.capacities, pairs[family], strict=True):
        left = settings.memory - weight_bytes(pair.model) if settings.memory else 0
        assert capacity.sequences == left // ((8 + 12) * head_bytes(pair.model) * pair.kv_heads)
    assert json.loads(json.dumps(measured.to_json()))["points"][0]["source_tokens"] == 12
    assert any("context 8, source 12" in line for line in conclusions(measured))
    show_bench(measured)


def test_the_source_is_as_long_as_the_context_by_default(pairs: dict[str, list[Contender]]) -> None:
    settings = BenchSettings(batches=(1,), contexts=(5, 9), caches=("dynamic",), steps=1, rounds=1)
    points = bench(pairs["t5"], settings).points
    assert [(point.context, point.source_tokens) for point in points] == [(5, 5), (9, 9)]
    assert all(point.models[0].self_cache_bytes == point.models[0].cross_cache_bytes for point in points)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_kinds_of_cache_compute_the_same_step(
    pairs: dict[str, list[Contender]], family: str, kv_heads: int
) -> None:
    model = next(one.model for one in pairs[family] if one.kv_heads == kv_heads)
    inputs = decoder_inputs(torch.full((2, 1), 3), encoder_output(model, 2, 7))
    with torch.inference_mode():
        logits = []
        for kind in ("dynamic", "static"):
            cache = filled_cache(model, kind=kind, batch=2, context=9, room=4, source=7)
            logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
            assert int(cache.get_seq_length()) == 10
            assert cache_bytes(cache) == (13 if kind == "static" else 10) * 2 * head_bytes(model) * kv_heads
            assert cross_cache_bytes(cache) == 7 * 2 * cross_bytes_per_token(model)
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_the_cache_and_not_the_encoder(pairs: dict[str, list[Contender]], family: str) -> None:
    """What the cross cache holds decides the logits; what the encoder gave no longer does."""
    model = pairs[family][1].model
    ids = torch.full((1, 1), 3)
    with torch.inference_mode():
        seen = []
        for of_encoder, of_cache in ((1, 1), (5, 1), (1, 5)):
            encoded = encoder_output(model, 1, 7)
            encoded.last_hidden_state = encoded.last_hidden_state * of_encoder
            cache = filled_cache(model, kind="dynamic", batch=1, context=3, room=0, source=7)
            for layer in cache.cross_attention_cache.layers:
                layer.values = layer.values * of_cache
            seen.append(model(**decoder_inputs(ids, encoded), past_key_values=cache, use_cache=True).logits)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_round_leaves_the_caches_where_they_were(pairs: dict[str, list[Contender]], kind: str) -> None:
    decoder = Decoder(pairs["t5"][1].model, cache_kind=kind, mode="eager", batch=2, context=6, steps=3, source=4)
    decoder.build()
    before = decoder.cache_bytes, decoder.cross_cache_bytes
    for _ in range(2):
        assert decoder.seconds_per_step() > 0
    assert (decoder.cache_bytes, decoder.cross_cache_bytes) == before
    assert int(decoder._cache.get_seq_length()) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_read_are_the_decoders(pairs: dict[str, list[Contender]], family: str) -> None:
    """Neither the encoder nor the projections of its output, but the output layer, shared as it is."""
    model = pairs[family][0].model
    unread = ("EncDecAttention.k.", "EncDecAttention.v.", "encoder_attn.k_proj.", "encoder_attn.v_proj.")
    looked_up = ("embed_tokens", "embed_positions", "relative_attention_bias", "shared")
    expected = sum(
        p.nbytes
        for name, p in model.get_decoder().named_parameters()
        if not any(part in name for part in (*unread, *looked_up))
    )
    assert bytes_read_per_step(model) == expected + model.get_output_embeddings().weight.nbytes


def test_positions_that_a_model_has_not_learnt_are_left_out(pairs: dict[str, list[Contender]]) -> None:
    bart = pairs["bart"]
    limit = bart[0].model.config.max_position_embeddings
    assert position_limit(bart[0].model.get_decoder()) == limit
    assert position_limit(pairs["t5"][0].model.get_decoder()) is None
    settings = BenchSettings(
        batches=(1,), contexts=(limit - 1, limit), caches=("dynamic",), source_tokens=limit, steps=1, rounds=1
    )
    first, second = bench(bart, settings).points
    assert (first.skipped, second.skipped) == ("", f"bart-4 has {limit} positions")
    long = BenchSettings(batches=(1,), contexts=(4,), source_tokens=limit + 1, steps=1, rounds=1, caches=("static",))
    assert bench(bart, long).points[0].skipped == f"the encoder of bart-4 has {limit} positions"


def test_an_encoder_that_hears_is_given_states_and_no_prefill() -> None:
    whisper = contender("whisper", 2)
    settings = BenchSettings(batches=(1,), contexts=(4,), source_tokens=6, steps=1, rounds=1)
    measured = bench([whisper], settings)
    assert [point.skipped for point in measured.points] == ["", ""]
    assert measured.points[0].models[0].prefill_seconds is None
    assert prefill_seconds(whisper.model, batch=1, context=4, source=6) is None


def test_an_encoder_that_asks_for_more_than_tokens_has_no_prefill() -> None:
    assert prefill_seconds(contender("udop", 2).model, batch=1, context=4, source=6) is None


def test_windows_slide_over_the_decoders_own_attention_only() -> None:
    model = tiny_model(tiny_config("t5gemma", num_heads=4, num_kv_heads=2))
    window = model.config.decoder.sliding_window
    cache = filled_cache(model, kind="static", batch=1, context=window + 8, room=2, source=window + 9)
    lengths = {layer.keys.shape[2] for layer in cache.self_attention_cache.layers}
    assert window in lengths
    assert {layer.keys.shape[2] for layer in cache.cross_attention_cache.layers} == {window + 9}


def test_models_that_do_not_compare_are_refused(pairs: dict[str, list[Contender]]) -> None:
    llama = contender("llama", 4)
    with pytest.raises(UsageError, match="t5-4 has an encoder and llama-4 has none"):
        bench([pairs["t5"][0], llama], BenchSettings())
    with pytest.raises(UsageError, match="--source-tokens: llama-4 has no encoder"):
        bench([llama], BenchSettings(source_tokens=4))
    with pytest.raises(UsageError, match="--source-tokens must be"):
        BenchSettings(source_tokens=0)


def test_a_decoder_that_needs_more_is_refused() -> None:
    model = tiny_model(tiny_config("t5", num_heads=4, num_kv_heads=4))
    model.decoder.forward = lambda **arguments: (_ for _ in ()).throw(ValueError("give me a page"))
    with pytest.raises(UnsupportedModelError, match="an encoder's output alone"):
        filled_cache(model, kind="dynamic", batch=1, context=2, room=0, source=2)


def test_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config("t5", num_heads=4, num_kv_heads=4)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    run = CliRunner()
    finished = run.invoke(app, ["convert", str(tmp_path / "t5"), "--groups", "2", "--out", str(tmp_path / "gqa")])
    assert finished.exit_code == 0, finished.output
    args = [
        "bench",
        str(tmp_path / "t5"),
        str(tmp_path / "gqa"),
        "--batch",
        "1",
        "--cache-context",
        "8",
        "--rounds",
        "1",
    ]
    shown = run.invoke(app, [*args, "--steps", "1", "--source-tokens", "16", "--memory", "1MiB"])
    assert shown.exit_code == 0, shown.output
    for part in ("own attention", "cross-attention", "(x 0.5)", "source 16", "8 tokens behind 16 of the encoder's"):
        assert part in shown.output
    assert isinstance(run.invoke(app, [*args, "--source-tokens", "1,2"]).exception, UsageError)


@pytest.mark.slow
def test_compiled_steps_run(pairs: dict[str, list[Contender]]) -> None:
    decoder = Decoder(pairs["t5"][1].model, cache_kind="static", mode="compile", batch=1, context=8, steps=2, source=8)
    decoder.build()
    assert decoder.seconds_per_step() > 0
