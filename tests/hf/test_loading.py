"""One way to load: every room meets the same class, the same errors and the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gqa_convert import plan
from gqa_convert.checkpoint.dtypes import FLOAT_NAMES, named_float
from gqa_convert.conversion import inspect as inspecting
from gqa_convert.errors import CheckpointError, GQAConvertError, UsageError
from gqa_convert.evaluate import models
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source, load_model, load_tokenizer, max_positions, pick_dtype
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config
from tests import factories
from tests.evaluate.tiny import write_lines, write_llama
from tests.support import Command


def test_a_class_whose_own_loading_returns_something_else_loads_everywhere(tmp_path: Path) -> None:
    """Qwen2.5-Omni's own `from_pretrained` reads voices too and cannot return what was missing."""
    config = tiny_config("qwen2_5_omni", num_kv_heads=2)
    tiny_model(config).save_pretrained(tmp_path / "omni")
    torch.save({}, tmp_path / "omni" / "spk_dict.pt")
    subject = models.subject(str(tmp_path / "omni"))
    assert subject.kv_heads == 2
    loaded = models.load(subject, dtype="fp32", device="cpu")
    assert type(loaded).__name__ == subject.source.model_class.__name__ == "Qwen2_5OmniForConditionalGeneration"
    same = load_model(Source.open(tmp_path / "omni"), dtype=torch.float32, attention="eager")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), same.parameters(), strict=True))


def loaders(folder: Path) -> dict[str, Callable[[], Any]]:
    """How each room comes to a model."""
    from gqa_convert.calibrate import self_text
    from gqa_convert.calibrate.parts import WholeModel

    return {
        "evaluate": lambda: models.load(models.subject(str(folder)), device="cpu"),
        "calibrate": lambda: WholeModel(Source.open(folder), dtype=torch.float32),
        "self_text": lambda: self_text.self_tokens(Source.open(folder), sequences=1, length=2),
        "uptrain": lambda: load_model(Source.open(folder), dtype=torch.float32, attention="sdpa"),
    }


def test_missing_tensors_are_reported_alike_in_every_room(tmp_path: Path) -> None:
    folder = factories.make(tmp_path / "m")
    factories.change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    said = set()
    for load in loaders(folder).values():
        with pytest.raises(CheckpointError) as refused:
            load()
        said.add(str(refused.value))
    assert len(said) == 1
    assert "missing keys: model.layers.1.mlp.up_proj.weight" in said.pop()


def test_mismatched_tensors_are_reported_alike_in_every_room(tmp_path: Path) -> None:
    folder = factories.make(tmp_path / "m")

    def shorten(tensors: factories.Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()

    factories.change_tensors(folder, shorten)
    said = set()
    for load in loaders(folder).values():
        with pytest.raises(CheckpointError) as refused:
            load()
        said.add(str(refused.value))
    assert len(said) == 1
    assert "mismatched keys: model.norm.weight (32,) for (64,)" in said.pop()


@pytest.mark.parametrize("content", [None, "{}", "{", "[]", '{"not": "a tokenizer"}'])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_tokenizer_is_one_error_that_says_what_to_do(family: str, content: str | None, tmp_path: Path) -> None:
    """Of Qwen2 transformers makes an empty tokenizer where there are no files."""
    folder = factories.make(tmp_path / "m", family)
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"no tokenizer could be loaded.*tokenizer\.json.* beside the weights"):
        load_tokenizer(folder)


def test_a_missing_tokenizer_is_exit_4_in_every_command(tmp_path: Path, command: Command) -> None:
    source = write_llama(tmp_path / "m")
    lines = write_lines(tmp_path / "text.jsonl")
    for file in source.glob("tokenizer*"):
        file.unlink()
    run = {
        "model": str(source),
        "output": str(tmp_path / "run"),
        "budget": {"steps": 1},
        "data": {"source": str(lines), "context": 16, "held_out_fraction": 0.3},
        "schedule": {"kind": "cosine", "peak": 1e-4},
        "train": {"batch_sequences": 1, "precision": "float32", "device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    for arguments in (
        ("gqa", "eval", source, "--data", lines),
        ("gqa-convert", source, "--groups", 2, "--calibrate", lines, "--method", "pca"),
        ("gqa", "uptrain", tmp_path / "run.yaml"),
    ):
        finished = command(*arguments)
        assert finished.code == 4, (arguments, finished)
        assert "no tokenizer could be loaded" in finished.err
        assert "Traceback" not in finished.err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(max_position_embeddings=77), 77),
        (transformers.GPT2Config(n_positions=33), 33),
        (transformers.MptConfig(max_seq_len=44), 44),
        (transformers.WhisperConfig(max_target_positions=55), 55),
        (transformers.BloomConfig(), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_context_length_is_read_one_way(config: Any, expected: int | None) -> None:
    assert max_positions(config) == expected


@pytest.mark.parametrize("name", [*FLOAT_NAMES, "FP16"])
def test_dtypes_have_the_names_that_users_give_them(name: str) -> None:
    kinds = {"b": torch.bfloat16, "h": torch.float16}
    expected = torch.float32 if "32" in name else kinds.get(name[0].lower(), torch.float16)
    assert named_float(name) is expected
    assert pick_dtype(name, torch.device("cpu")) is expected


def test_an_unknown_dtype_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--dtype int8: choose one of auto, float32, fp32"):
        pick_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize("name", ["pipeline", "AutoModelForCausalLM", "set_seed", "PreTrainedModel", "nothing"])
def test_architectures_name_models_and_nothing_else(name: str, tmp_path: Path) -> None:
    """Whatever transformers has by the name would be called."""
    folder = factories.make(tmp_path / "m")
    factories.change_config(folder, architectures=[name])
    assert Source.open(folder).model_class is transformers.LlamaForCausalLM


class Counts:
    """Counts configuration loads and models built without memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs = self.builds = 0
        load, build = api.load_config, api.build_on_meta

        def load_config(*args: Any, **kwargs: Any) -> Any:
            self.configs += 1
            return load(*args, **kwargs)

        def build_on_meta(*args: Any, **kwargs: Any) -> Any:
            self.builds += 1
            return build(*args, **kwargs)

        monkeypatch.setattr(api, "load_config", load_config)
        monkeypatch.setattr(api, "build_on_meta", build_on_meta)


@pytest.mark.parametrize(("family", "builds"), [("llama", 2), ("gpt2", 2), ("gpt_neox", 3)])
def test_a_plan_reads_the_configuration_once(
    family: str, builds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And builds two models: as it is, as it becomes (three where it is written as another family)."""
    tiny_model(tiny_config(family)).save_pretrained(tmp_path / "m")
    counts = Counts(monkeypatch)
    plan(tmp_path / "m", groups=4, allow_slow=True)
    assert (counts.configs, counts.builds) == (1, builds)


@pytest.mark.parametrize(("family", "builds"), [("llama", 4), ("gpt2", 5), ("gpt_neox", 5)])
def test_an_inspection_reads_the_configuration_once(
    family: str, builds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And builds a model for each number of KV heads that there can be: 8, 4, 2, 1; one more to read another family."""
    tiny_model(tiny_config(family)).save_pretrained(tmp_path / "m")
    counts = Counts(monkeypatch)
    shown = inspecting.inspect(tmp_path / "m")
    assert (counts.configs, counts.builds) == (1, builds)
    assert set(shown.legal_groups) <= {1, 2, 4, 8}
    assert all(cost is None or cost > 0 for _, cost, _ in shown.cache)


def test_a_teacher_or_reference_that_is_none_is_refused_like_any_model(tmp_path: Path) -> None:
    with pytest.raises(GQAConvertError, match="does not exist"):
        Source.open(tmp_path / "nothing")
