import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gqa_convert.budget.arithmetic import budget, horizon
from gqa_convert.budget.counts import format_count, parse_bytes, parse_count, parse_counts
from gqa_convert.budget.shape import devices, known_model, known_models, peak_flops, shape_of_folder
from gqa_convert.errors import UsageError
from tests import factories
from tests.support import Command


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2T", 2 * 10**12),
        ("299.9B", 299_900_000_000),
        ("8k", 8192),
        ("0.5K", 512),
        ("50M", 50_000_000),
        (2**62, 2**62),
        ("1e9", 10**9),
        (17, 17),
        ("2_097_152", 2097152),
    ],
)
def test_counts_read_as_people_write_them(text: int | str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text", ["two", "-3", "1.5", "", "3Q", True, "1e400", 1e400, float("nan"), "9" * 5000, 2**63, "1e30"]
)
def test_what_is_no_count_is_refused(text: bool | float | str) -> None:
    with pytest.raises(UsageError):
        parse_count(text)


def test_presets_and_a_price(command: Command) -> None:
    arguments = ("gqa", "budget", "llama-2-7b", "--hardware", "h100")
    plain = json.loads(command(*arguments, "--json").out)
    paid = json.loads(command(*arguments, "--json", "--price", 2.5).out)
    assert plain["cost"] is None
    assert paid["cost"] == pytest.approx(2.5 * paid["device_hours"])
    presets = plain["presets"]
    assert presets["fast"]["flops"] < presets["best"]["flops"] < presets["heal"]["flops"]
    # 262,144 tokens through 6.7e9 parameters, twice each, and little beside.
    assert presets["fast"]["flops"] == pytest.approx(2 * 262_144 * 6.7e9, rel=0.3)
    assert presets["heal"]["device_hours"] < 0.05 * plain["device_hours"], "that is what the presets are for"
    shown = command(*arguments, "--price", 2.5).out
    assert "--preset best" in shown
    assert "at 2.5 per device hour" in shown


def test_counts_are_spelt_for_people() -> None:
    assert [format_count(v) for v in (999, 65_536, 2_100_000, 52.4e9, 2e12)] == ["999", "65,536", "2.1M", "52.4B", "2T"]


def test_one_spelling_means_one_number_everywhere() -> None:
    for text in ("8k", "512", "2M"):
        assert parse_counts(text, "--context") == (parse_count(text),)
    assert parse_count("8k") == parse_bytes("8k", "--memory") == 8192
    for value in (7, 8192, 65_536, 2_000_000, 3 * 10**9):
        assert parse_count(format_count(value)) == value


def test_steps_win_over_tokens_and_tokens_over_alpha() -> None:
    given: dict[str, Any] = {"batch_tokens": 100, "alpha": 0.05, "pretraining_tokens": 100_000}
    assert horizon(**given, steps=7, tokens=900).steps == 7
    assert horizon(**given, tokens=901).steps == 10
    resolved = horizon(**given)
    assert (resolved.steps, resolved.tokens, resolved.came_from) == (50, 5000, "alpha")
    assert resolved.alpha == pytest.approx(0.05)


def test_the_papers_recipe_is_fifty_thousand_steps() -> None:
    model: Any = known_model("t5-v1_1-xxl")
    resolved = horizon(batch_tokens=model.batch_tokens, pretraining_tokens=model.tokens)
    assert resolved.steps == 50_000


def test_alpha_of_pretraining_steps() -> None:
    assert horizon(batch_tokens=10, alpha=0.1, pretraining_steps=100, pretraining_batch_tokens=50).steps == 50


@pytest.mark.parametrize("given", [{}, {"alpha": 2.0, "pretraining_tokens": 10}])
def test_a_share_needs_a_whole(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="alpha"):
        horizon(batch_tokens=10, **given)


def test_llama_flops_agree_with_six_n_plus_attention() -> None:
    shape = known_model("llama-2-7b").shape
    assert shape.matmul_parameters == 6738415616 - 32000 * 4096
    assert shape.training_flops_per_token(4096) == 6 * shape.matmul_parameters + 12 * 32 * 4096 * 4096


def test_the_papers_600_tpu_v3_chip_days_are_a_plausible_utilisation() -> None:
    # Ainslie et al. 2023, section 2.1: alpha = 0.05 took about 600 TPUv3 chip-days.
    model: Any = known_model("t5-v1_1-xxl")
    estimate = budget(
        model.shape,
        horizon(batch_tokens=model.batch_tokens, pretraining_tokens=model.tokens),
        hardware="tpuv3",
        mfu=1.0,
    )
    assert 0.2 < estimate.device_hours / 24 / 600 < 0.6


def test_distillation_from_a_model_as_large_costs_a_third_more() -> None:
    shape = known_model("pythia-1b").shape
    estimate = budget(shape, horizon(batch_tokens=2048, steps=10), teacher=shape)
    assert estimate.distillation_overhead == pytest.approx(1 / 3)
    assert estimate.flops == pytest.approx(estimate.student_flops * 4 / 3)


def test_hours_and_bytes() -> None:
    shape = known_model("pythia-1b").shape
    estimate = budget(shape, horizon(batch_tokens=2_097_152, steps=100), hardware="100", device_count=4, mfu=0.5)
    assert estimate.hours == pytest.approx(estimate.flops / (100e12 * 4 * 0.5) / 3600)
    assert estimate.device_hours == pytest.approx(4 * estimate.hours)
    assert estimate.checkpoint_bytes == 12 * shape.parameters


@pytest.mark.parametrize("wrong", [{"hardware": "abacus"}, {"mfu": 0}, {"device_count": 0}])
def test_impossible_hardware_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        budget(known_model("pythia-1b").shape, horizon(batch_tokens=1, steps=1), **wrong)


def test_every_known_model_is_consistent_and_says_where_it_is_from() -> None:
    for name, model in known_models().items():
        assert model.source, name
        assert 0 < model.shape.encoder_parameters < model.shape.matmul_parameters or not model.shape.encoder_parameters
        # Published parameter counts against the shape: attention and a feed-forward of about 4x the width.
        assert model.shape.parameters > 6 * model.shape.layers * model.shape.attention_width**2, name
        if model.steps and model.batch_tokens:
            assert model.steps * model.batch_tokens == pytest.approx(model.tokens, rel=0.01), name


def test_an_unknown_model_names_its_neighbours() -> None:
    with pytest.raises(UsageError, match="llama-2-7b"):
        known_model("llama2-7b")


def test_peaks_are_found_by_the_drivers_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("cpu") is None
    assert all(entry["source"] for entry in devices().values())


def test_a_folders_shape_is_read_from_headers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    shape = shape_of_folder(tmp_path)
    assert shape.parameters == model.num_parameters()
    assert shape.matmul_parameters == shape.parameters - 99 * 32
    assert (shape.layers, shape.attention_width, shape.context, shape.weight_bytes) == (2, 32, 128, 4)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_key_value_heads", "data/text.jsonl"), ("num_attention_heads", 0), ("vocab_size", True), ("head_dim", -8)],
)
def test_a_setting_that_is_no_count_is_named(tmp_path: Path, setting: str, value: object) -> None:
    factories.make(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(UsageError, match=setting):
        shape_of_folder(tmp_path / "model")


def test_layers_with_their_own_kv_heads_count_by_their_mean(tmp_path: Path) -> None:
    factories.make(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": [1, 4, 4]}))
    assert shape_of_folder(tmp_path / "model").kv_width == 3 * head_dim


def test_the_command_prints_json_without_torch() -> None:
    code = (
        "import sys; from gqa_convert.cli.main import app\n"
        "app(['budget', 'llama-2-7b', '--alpha', '0.05', '--json', '--distill'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed["tokens"] == pytest.approx(100e9, rel=1e-4)
    assert printed["steps"] == 25_000


def test_the_command_lists_and_shows() -> None:
    from gqa_convert.cli.main import app

    runner = CliRunner()
    assert "pythia-1.4b" in runner.invoke(app, ["budget", "--list"]).output
    shown = runner.invoke(app, ["budget", "t5-v1_1-xxl", "--hardware", "tpuv3", "--devices", "600"]).output
    assert "50,000 steps" in shown
    assert "FLOPs" in shown
