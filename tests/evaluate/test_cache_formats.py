"""Caches in fewer bits: numbers as ggml's reference rounds them, one pass as token-by-token decoding, and the deal."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.cache_formats import QuantisedLayer, WithCache, quantised_cache, restore, store
from gqa_convert.evaluate.deals import conclusions
from gqa_convert.evaluate.decode.settings import QUANTISED
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.metric import Figure
from gqa_convert.evaluate.models import cache_bytes_per_token
from gqa_convert.evaluate.results import Comparison, Evaluation

SHAPE = (2, 3, 5, 64)


def random(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 3


def ggml(row: np.ndarray, name: str) -> np.ndarray:
    """Quantise and restore one block of 32 as quantize_row_q8_0_ref and quantize_row_q4_0_ref of ggml do."""
    if name == "int8":
        d = np.float32(np.abs(row).max() / 127)
        return np.rint(row * (1 / d)) * np.float32(np.float16(d))
    d = np.float32(row[np.abs(row).argmax()] / -8)
    codes = np.minimum(15, (row * (1 / d) + np.float32(8.5)).astype(np.int8))
    return (codes.astype(np.float32) - 8) * np.float32(np.float16(d))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_blocks_are_rounded_as_by_ggml(name: str) -> None:
    x = random()
    plain = x.reshape(-1, 32).numpy()
    expected = np.stack([ggml(row, name) for row in plain]).reshape(SHAPE)
    assert np.allclose(restore(store(x, name), name, torch.float32).numpy(), expected, atol=1e-6)


def test_fp8_is_the_nearest_number_of_its_format_and_does_not_overflow() -> None:
    x = torch.tensor([[[[1.0, 1.06, -0.4, 1e6]]]])
    assert restore(store(x, "fp8"), "fp8", torch.float32).flatten().tolist() == [1.0, 1.0, -0.40625, 448.0]


@pytest.mark.parametrize(("name", "bits"), [("fp8", 8), ("int8", 8.5), ("int4", 4.5)])
def test_bits_per_value(name: str, bits: float) -> None:
    held = store(random().bfloat16(), name)
    assert sum(x.nbytes for x in held) * 8 == bits * random().numel()


@pytest.mark.parametrize("name", QUANTISED)
def test_zeros_stay_zeros(name: str) -> None:
    assert not restore(store(torch.zeros(SHAPE), name), name, torch.float32).any()


@pytest.mark.parametrize("name", QUANTISED)
def test_one_pass_reads_what_decoding_token_by_token_reads(llama: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.randint(3, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = WithCache(model, name)(input_ids=ids).logits
        cache = quantised_cache(name)
        steps = [model(input_ids=ids[:, [t]], past_key_values=cache, use_cache=True).logits for t in range(12)]
        assert torch.allclose(whole, torch.cat(steps, 1), atol=1e-4)
        assert not torch.allclose(whole, model(input_ids=ids).logits, atol=1e-5), "nothing was rounded"


@pytest.mark.parametrize("name", QUANTISED)
def test_cross_attention_reads_the_restored_cache_at_every_step(name: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, initializer_factor=3.0)).eval().double()
    source, target = torch.randint(3, 50, (2, 9)), torch.randint(3, 50, (2, 6))
    with torch.inference_mode():
        whole = WithCache(model, name)(input_ids=source, decoder_input_ids=target).logits
        cache, encoded = quantised_cache(name, across=True), model.get_encoder()(source)
        steps = [
            model(encoder_outputs=encoded, decoder_input_ids=target[:, [t]], past_key_values=cache).logits
            for t in range(6)
        ]
    assert torch.allclose(whole, torch.cat(steps, 1), atol=1e-4)


@pytest.mark.parametrize("name", QUANTISED)
def test_windows_slide_over_it(name: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = MistralConfig(**sizes, vocab_size=50, num_key_value_heads=2, sliding_window=4, initializer_range=0.3)
    model, ids = MistralForCausalLM(config).eval(), torch.randint(3, 50, (2, 12))
    with torch.inference_mode():
        whole, cache = WithCache(model, name)(input_ids=ids).logits, quantised_cache(name)
        steps = [model(input_ids=ids[:, [t]], past_key_values=cache).logits for t in range(12)]
    assert torch.allclose(whole, torch.cat(steps, 1), atol=1e-4)


def test_a_layer_takes_what_beam_search_and_assisted_decoding_do_to_it() -> None:
    layer = QuantisedLayer("int4")
    x = random()
    layer.update(x, x)
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    keys, values = layer.update(x[:, :, :1], x[:, :, 1:2])
    expected = restore(store(x, "int4"), "int4", torch.float32)
    assert torch.equal(keys[:, :, :3], expected.flip(0)[:, :, :3])
    assert torch.equal(values[:, :, 3:], expected[:, :, 1:2])
    assert layer.get_seq_length() == 4


def test_every_model_is_measured_with_every_format(llama: Path, llama_gqa2: Path, lines: Path) -> None:
    settings = EvalSettings(data=str(lines), max_windows=4, caches=("int8", "int4"))
    counted: list[int] = []
    evaluation = evaluate(llama, [llama_gqa2], settings, on_windows=counted.append, on_total=counted.append)
    assert counted[0] == sum(counted[1:])
    names = ["tiny-llama, int8 cache", "tiny-llama, int4 cache", "tiny-llama-gqa2, int8 cache"]
    assert [c.model.name for c in evaluation.quantised][:3] == names
    # Heads of 8 values in float32: 32 bytes, or 8 codes and one scale of 2 bytes, or 4 and 2.
    assert [c.figures["cache_ratio"].value for c in evaluation.quantised] == [10 / 32, 6 / 32, 5 / 32, 3 / 32]
    int8, int4 = evaluation.quantised[:2]
    assert 0 < int8.kl < int4.kl
    again = Evaluation.from_json(json.loads(json.dumps(evaluation.to_json())))
    assert [c.to_json() for c in again.quantised] == [c.to_json() for c in evaluation.quantised]
    assert evaluation.to_json()["conclusions"] == conclusions(again)


def test_bytes_of_a_cache_count_its_scales(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    assert cache_bytes_per_token(WithCache(model, "int8")) == 2 * 2 * 4 * (8 + 2)


@pytest.fixture(scope="module")
def measured(llama: Path, llama_gqa2: Path, lines: Path) -> Evaluation:
    return evaluate(llama, [llama_gqa2], EvalSettings(data=str(lines), max_windows=2, caches=("int8",)))


def priced(comparison: Comparison, ratio: float, loss: float) -> Comparison:
    changes = {"cache_ratio": Figure(ratio), "loss_difference": Figure(loss, (loss - 0.01, loss + 0.01))}
    return replace(comparison, figures=comparison.figures | changes)


@pytest.mark.parametrize(
    ("converted", "quantised", "together", "words"),
    [
        ((0.5, 0.3), (0.5, 0.0), (0.25, 0.3), ("quantise the cache, do not convert", "Both together, with int8: 0.25")),
        ((0.5, 0.0), (0.5, 0.3), (0.25, 0.31), ("converting is the better deal", "Both together, with int8: 0.25")),
        ((0.5, 0.0), (0.5, 0.001), (0.25, 0.0), ("no clear difference in loss", "0.25 of the 16-bit cache at +0.0000")),
        ((0.25, 0.3), (0.5, 0.0), (0.12, 0.3), ("no cache of the original's is as small", "0.12 of the 16-bit cache")),
        ((0.5, 0.3), (0.2, 0.0), (0.25, 0.3), ("do not convert", "Both together are no better")),
    ],
)
def test_the_better_deal(
    measured: Evaluation,
    converted: tuple[float, float],
    quantised: tuple[float, float],
    together: tuple[float, float],
    words: tuple[str, str],
) -> None:
    evaluation = replace(
        measured,
        dtype="bfloat16",
        converted=(priced(measured.converted[0], *converted),),
        quantised=(priced(measured.quantised[0], *quantised), priced(measured.quantised[1], *together)),
    )
    _, line = conclusions(evaluation)
    for part in words:
        assert part in line


def test_bytes_are_set_against_16_bits_though_models_run_in_32(measured: Evaluation) -> None:
    assert measured.dtype == "float32"
    first, _ = conclusions(measured)
    assert first.startswith(f"tiny-llama, int8 cache: {10 / 16:.2f} of the 16-bit cache"), "float32 would say 0.31"


def test_the_commands_take_formats(llama: Path, llama_gqa2: Path, lines: Path) -> None:
    models = [str(llama), str(llama_gqa2)]
    shown = CliRunner().invoke(
        app, ["eval", *models, "--data", str(lines), "--max-windows", "2", "--quantised-cache", "fp8"]
    )
    assert shown.exit_code == 0, shown.output
    assert "fp8 cache" in shown.output
    bench = ["bench", *models, "--batch", "2", "--cache-context", "8", "--steps", "2", "--rounds", "2"]
    timed = CliRunner().invoke(app, [*bench, "--cache", "dynamic,int4", "--json"])
    assert timed.exit_code == 0, timed.output
    points = json.loads(timed.stdout)["points"]
    held = {point["cache"]: [model["cache_bytes"] for model in point["models"]] for point in points}
    assert any("tiny-llama-gqa2, int4 cache: 19%" in line for line in json.loads(timed.stdout)["conclusions"])
    assert [small / whole for small, whole in zip(held["int4"], held["dynamic"], strict=True)] == [6 / 32, 6 / 32]


def test_a_sweep_and_its_page_tell_the_deal(llama: Path, lines: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["sweep", str(llama), "--groups", "1", "--data", str(lines), "--max-windows", "2", "--out", str(run)]
    quick = ["--no-bench", "--no-sensitivity", "--quantised-cache", "int4"]
    shown = CliRunner().invoke(app, [*arguments, *quick])
    assert shown.exit_code == 0, shown.output
    point = json.loads((run / "points" / "mean-g1" / "point.json").read_text())
    assert [c["model"]["name"] for c in point["evaluation"]["quantised"]] == [
        "tiny-llama, int4 cache",
        "mean-g1, int4 cache",
    ]
    deal = point["point"]["deal"]
    assert deal.startswith("mean-g1: 0.25 of the 16-bit cache")
    assert deal in shown.output
    paged = CliRunner().invoke(app, ["report", str(run)])
    assert paged.exit_code == 0, paged.output
    assert deal in unescape("".join(page.read_text() for page in run.rglob("*.html")))


def test_a_format_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="--quantised-cache int3: choose from fp8, int8, int4"):
        EvalSettings(data="demo", caches=("int3",))
