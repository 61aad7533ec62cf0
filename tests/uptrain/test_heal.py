"""Healing: a converted model comes back to its original, on attention alone, and resumes, stops and refuses soundly."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gqa_convert import convert
from gqa_convert.cli.main import app
from gqa_convert.errors import OutputError, Preempted, UsageError
from gqa_convert.uptrain import heal as healing
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.heal import HealOptions, heal, heal_rate
from gqa_convert.uptrain.heal_folder import settled
from gqa_convert.uptrain.model import attention_norms
from gqa_convert.uptrain.parameters import choose_parameters
from gqa_convert.uptrain.read_config import parse_config
from gqa_convert.uptrain.step import train_step as real_step
from tests.uptrain.conftest import make_tiny

OPTIONS: dict[str, Any] = {"context": 32, "tokens": 40_000, "rate": 0.01}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads matter: its text is predictable and its logits are sharp."""
    return make_tiny(tmp_path_factory.mktemp("heal") / "original", kv_heads=4, seed=3, sharpness=30.0)


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("heal") / "converted"
    convert(original, groups=1, out=out)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_healed_model_predicts_as_its_original_did_and_only_its_attention_has_changed(
    original: Path, converted: Path, text_file: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    result = heal(
        converted, original, out=tmp_path / "healed", options=HealOptions(text=str(text_file), **OPTIONS),
        quiet=True, tell=told.append,
    )  # fmt: skip
    before, after = weights(converted), weights(result.out)
    assert {key for key in after if not torch.equal(before[key], after[key])} == {
        key for key in after if "self_attn" in key
    }
    runs = json.loads((result.out / "gqa_convert.json").read_text())
    assert runs["uptraining"]["config"]["objective"]["distillation"]["cross_entropy_weight"] == 0
    assert runs["conversion"]["after"]["kv_heads"] == 1
    assert distance(original, result.out) < 0.5 * distance(original, converted)
    (forecast,) = (line for line in told if "parameters are trained on 40,000 tokens" in line)
    assert "hours" in forecast
    assert "GB" in forecast
    assert not list(tmp_path.glob(".healed*")), "nothing is left beside the result"


def test_all_parameters_are_trained_where_that_is_asked_for(
    original: Path, converted: Path, text_file: Path, tmp_path: Path
) -> None:
    options = HealOptions(**{**OPTIONS, "text": str(text_file), "tokens": 4096, "parameters": "all"})
    result = heal(converted, original, out=tmp_path / "healed", options=options, quiet=True)
    before, after = weights(converted), weights(result.out)
    assert {key for key in after if torch.equal(before[key], after[key])} == set()
    assert distance(original, result.out) < distance(original, converted)


def distance(original: Path, folder: Path) -> float:
    """KL from the original on sequences of words."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 20, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        t, s = (AutoModelForCausalLM.from_pretrained(f)(ids).logits.log_softmax(-1) for f in (original, folder))
    return float((t.exp() * (t - s)).sum(-1).mean())


def test_interrupted_and_started_again_it_gives_the_same_bits(
    original: Path, converted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = HealOptions(text=str(text_file), **{**OPTIONS, "tokens": 20_000})
    straight = heal(converted, original, out=tmp_path / "straight", options=options, quiet=True)
    real = real_step

    def train_step(parts: Any, guards: Any, at: int, **rest: Any) -> Any:
        result = real(parts, guards, at, **rest)
        if at == 6:
            signal.raise_signal(signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        with pytest.raises(Preempted):
            heal(converted, original, out=tmp_path / "resumed", options=options, quiet=True)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(UsageError, match="interrupted healing with other options"):
        heal(converted, original, out=tmp_path / "resumed", options=HealOptions(text=str(text_file)), quiet=True)
    resumed = heal(converted, original, out=tmp_path / "resumed", options=options, quiet=True)
    assert same_bits(weights(straight.out), weights(resumed.out))
    assert not list(tmp_path.glob(".resumed*"))


def test_it_stops_when_the_target_is_met_and_a_second_run_does_not_go_on(
    original: Path, converted: Path, text_file: Path, tmp_path: Path
) -> None:
    options = HealOptions(text=str(text_file), until=5.0, **OPTIONS)
    result = heal(converted, original, out=tmp_path / "out", options=options, work=tmp_path / "work", quiet=True)
    assert result.tokens < OPTIONS["tokens"]
    assert result.loss_after - result.loss_original <= 5.0
    again = heal(
        converted, original, out=tmp_path / "out", options=options, work=tmp_path / "work", quiet=True, force=True
    )
    assert again.tokens == result.tokens


def test_a_work_folder_that_cannot_be_made_is_one_line(
    original: Path, converted: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written to"):
        heal(converted, original, out=tmp_path / "o", options=HealOptions(text=str(text_file)),
             work=tmp_path / "file" / "work", quiet=True)  # fmt: skip


def test_a_target_needs_something_to_be_near_to(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="nothing to compare with"):
        parse_config({**settings, "evaluation": {"target": 0.1}})


@pytest.mark.parametrize(
    "given",
    [{"tokens": 0}, {"until": 0.0}, {"rate": 1.5}, {"context": 1}, {"parameters": "some"}],
    ids=lambda g: next(iter(g)),
)
def test_values_that_mean_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        HealOptions(**given)


def test_another_models_vocabulary_is_refused(original: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=99, max_position_embeddings=64,
        )
    )  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the cat sees a dog {'and ' * i}"}) + "\n" for i in range(200)))
    with pytest.raises(UsageError, match="vocabulary"):
        heal(
            original, tmp_path / "other", out=tmp_path / "o", options=HealOptions(text=str(text), **OPTIONS), quiet=True
        )
    assert not (tmp_path / "o").exists()


def test_without_text_the_original_writes_it(original: Path, converted: Path, tmp_path: Path) -> None:
    options = HealOptions(**{**OPTIONS, "tokens": 4096})
    result = heal(converted, original, out=tmp_path / "out", options=options, work=tmp_path / "work", quiet=True)
    lines = (tmp_path / "work" / "original-wrote.jsonl").read_text().splitlines()
    assert len(lines) >= 64
    assert all(len(json.loads(line)["text"].split()) > 10 for line in lines)
    assert result.tokens == 4096


def test_norms_of_queries_and_keys_are_trained_and_no_other_norm() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=30,
        )
    )  # fmt: skip
    norms = attention_norms(model)
    assert {name.rpartition(".")[2] for name in norms} == {"q_norm", "k_norm"}
    section = parse_config_section()
    choose_parameters(model, section)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


def parse_config_section() -> Any:
    from gqa_convert.uptrain.config import TrainSection

    return TrainSection(batch_sequences=1, parameters="attention")


@pytest.mark.parametrize(("world", "sequences", "micro"), [(1, 2, 2), (2, 2, 1), (3, 3, 1), (8, 8, 1)])
def test_every_process_has_a_sequence(
    world: int,
    sequences: int,
    micro: int,
    converted: Path,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    train = healing.heal_settings(HealOptions(tokens=1000), converted, original, tmp_path)["train"]
    assert (train["batch_sequences"], train["micro_batch"]) == (sequences, micro)


@pytest.mark.parametrize(("context", "apart"), [(2, True), (64, False)])
def test_heads_are_taken_apart_where_whole_matrices_would_cost_more_than_the_passes(
    context: int, apart: bool, converted: Path, original: Path, tmp_path: Path
) -> None:
    values = healing.heal_settings(HealOptions(tokens=1000, context=context), converted, original, tmp_path)
    assert values["optimizer"]["per_head"] is apart


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("float32", "float32")])
def test_where_bfloat16_is_slow_nothing_computes_in_it(
    precision: str, dtype: str, converted: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_convert.uptrain.forecast.training_precision", lambda: precision)
    values = healing.heal_settings(HealOptions(tokens=1000), converted, original, tmp_path)
    assert values["train"]["precision"] == precision
    assert values["optimizer"]["muon_dtype"] == values["objective"]["distillation"]["dtype"] == dtype


def test_passages_of_the_text_come_back_in_their_share_of_the_run(
    original: Path, converted: Path, text_file: Path, tmp_path: Path
) -> None:
    options = HealOptions(text=(str(text_file), f"{text_file}=3"), copies=0.25, **{**OPTIONS, "tokens": 4000})
    result = heal(converted, original, out=tmp_path / "healed", options=options, work=tmp_path / "work", quiet=True)
    assert result.tokens >= 4000
    values = json.loads((tmp_path / "work" / "uptrain.json").read_text())
    weights = [source["weight"] for source in values["data"]["sources"]]
    assert weights[-1] / sum(weights) == pytest.approx(0.25)
    made = [json.loads(line)["text"] for line in (tmp_path / "work" / "copies.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(original)
    count = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in made)
    assert 0.15 * 4000 < count < 0.6 * 4000
    passages = made[0].split("\n\n")
    assert passages[0] == passages[-1]


@pytest.mark.parametrize("wrong", [{"copies": 1.0}, {"copies": -0.1}, {"copies": 0.1, "answers": True, "text": "a"}])
def test_a_share_of_copies_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="copies"):
        HealOptions(**wrong)


def test_wide_models_move_less() -> None:
    assert heal_rate(576) == pytest.approx(2 * heal_rate(1152))
    assert heal_rate(4096) < 3e-4
    assert heal_rate(64) == heal_rate(32) == 4e-3


def test_the_preset_converts_by_best_and_heals_and_goes_on_after_the_conversion(
    original: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(original), "--groups", "1", "--preset", "heal", "--calibrate", str(text_file), "--out",
               str(out), "--heal-tokens", "4k", "--calibration-sequences", "8", "--calibration-length", "32",
               "--refit-steps", "5", "--work", str(tmp_path / "work"), "--json"]  # fmt: skip
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    first = json.loads(shown.stdout)
    assert first["tokens"] >= 4000
    record = json.loads((out / "gqa_convert.json").read_text())
    assert record["conversion"]["recipe"]["refit"]
    assert "uptraining" in record
    untouched = (tmp_path / "work" / "converted" / "model.safetensors").stat().st_mtime_ns
    again = CliRunner().invoke(app, [*command, "--force"])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "work" / "converted" / "model.safetensors").stat().st_mtime_ns == untouched
    other = CliRunner().invoke(app, [*command, "--force", "--refit-steps", "6"])
    assert isinstance(other.exception, UsageError)
    assert "interrupted run converted another model there" in str(other.exception)


def test_options_of_the_preset_without_it_are_refused(original: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["convert", str(original), "--groups", "1", "--heal-tokens", "4k"])
    assert isinstance(shown.exception, UsageError)
    assert "--preset heal" in str(shown.exception)


@pytest.mark.parametrize("which", ["attention", "all"])
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    which: str, original: Path, converted: Path, tmp_path: Path
) -> None:
    asked = ["--parameters", which, "--dry-run", "--json"]
    shown = CliRunner().invoke(app, ["heal", str(converted), str(original), "--out", str(tmp_path / "o"), *asked])
    assert shown.exit_code == 0, shown.output
    cost = json.loads(shown.stdout)
    trained = sum(v.numel() for k, v in weights(converted).items() if which == "all" or "self_attn" in k)
    assert cost["trained"] == trained
    assert cost["hours"] > 0
    assert cost["memory_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_demo_is_this_pythons_modules_as_for_calibrate(original: Path, converted: Path, tmp_path: Path) -> None:
    values = healing.heal_settings(HealOptions(text="demo", held_out="demo"), converted, original, tmp_path)
    config = parse_config(values)
    assert config.data.source.paths == ("gqa_convert.data.stdlib:training_texts",)
    assert config.data.held_out_source.paths == ("gqa_convert.data.stdlib:held_out_texts",)


def test_several_texts_are_mixed_by_weight_and_an_interrupted_run_knows_them_again(
    original: Path, converted: Path, text_file: Path, tmp_path: Path
) -> None:
    texts = (f"{text_file}=0.75", "demo=0.25")
    values = healing.heal_settings(HealOptions(text=texts), converted, original, tmp_path)
    assert [entry["weight"] for entry in values["data"]["sources"]] == [0.75, 0.25]
    assert [name for name, _, _ in parse_config(values).data.named] == [text_file.stem, "training_texts"]
    work = tmp_path / "work"
    work.mkdir()
    settle: dict[str, Any] = {"trust_remote_code": False}
    first = settled(HealOptions(text=texts), converted, original, work, **settle)
    assert settled(HealOptions(text=texts), converted, original, work, **settle) == first
    with pytest.raises(UsageError, match="other options"):
        settled(HealOptions(text=texts[::-1]), converted, original, work, **settle)
    with pytest.raises(UsageError, match="write a weight above 0"):
        healing.heal_settings(HealOptions(text=("a=x", "b")), converted, original, tmp_path)
