import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import VerificationError
from gqa_convert.hf.api import KeyMap
from gqa_convert.uptrain.export import both_spellings, write_final
from gqa_convert.uptrain.source_keys import restore_keys
from tests.support import load_with_info

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}


def saved(folder: Path, *, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL, **more))
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_keys_and_dtypes_of_the_source(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    source, target = tmp_path / "source", tmp_path / "final"
    saved(source, dtype=dtype, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}  # as gathered from shards
    write_final(model, weights, source=source, target=target, uptraining={"steps": 1})
    described = [{k: (i.dtype, i.shape) for k, i in Checkpoint.open(f).tensors.items()} for f in (source, target)]
    assert described[0] == described[1]
    assert ("lm_head.weight" in described[1]) != tied
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert torch.allclose(again.lm_head.weight, model.lm_head.weight, atol=0 if dtype == torch.float32 else 5e-3)
    assert json.loads((target / "gqa_convert.json").read_text())["uptraining"] == {"steps": 1}
    card = (target / "README.md").read_text()
    assert "# source\n\nsource, trained further. No attention heads were merged." in card
    assert "None" not in card


def test_shards_get_the_sources_keys_and_what_no_code_reads(tmp_path: Path) -> None:
    source, stage = tmp_path / "source", tmp_path / "stage"
    model = saved(source)
    state = load_file(source / "model.safetensors")
    old = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    old["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(old, source / "model.safetensors", {"format": "pt"})
    model.save_pretrained(stage, max_shard_size="2KB")
    restore_keys(stage, Checkpoint.open(source), KeyMap(model))
    written = Checkpoint.open(stage)
    assert written.is_sharded
    assert written.tensors.keys() == old.keys()
    assert all(torch.equal(written.tensor(key), old[key]) for key in old)
    _, info = load_with_info(stage, LlamaForCausalLM)
    assert not info["missing_keys"]
    files = {file: file.read_bytes() for file in stage.iterdir()}
    restore_keys(stage, Checkpoint.open(source), KeyMap(model))
    assert files == {file: file.read_bytes() for file in stage.iterdir()}  # nothing more to do


def test_a_result_of_other_shapes_is_not_written(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    other = LlamaForCausalLM(LlamaConfig(**{**SMALL, "intermediate_size": 24}))
    with pytest.raises(VerificationError, match="shape"):
        write_final(
            other, dict(other.state_dict()), source=tmp_path / "source", target=tmp_path / "final", uptraining={}
        )
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 5e4, "torch_dtype": "float32"},
        {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "dtype": "float32"},
        {"rope_parameters": {"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0}, "dtype": "float32"},
        {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"},
    ],
    ids=["old", "new", "new-scaled", "old-scaled"],
)
def test_both_spellings_mean_the_same(tmp_path: Path, given: dict[str, Any]) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    plain = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("rope_parameters", "dtype")}
    path.write_text(json.dumps({**plain, **given}, indent=2))
    before = AutoConfig.from_pretrained(tmp_path)
    text = both_spellings(tmp_path, path.read_text())
    both = json.loads(text)
    assert both["rope_theta"] == both["rope_parameters"]["rope_theta"] == 5e4
    assert both["dtype"] == both["torch_dtype"] == "float32"
    assert list(both)[:3] == list(plain)[:3]
    if "scaled" in str(given) or "linear" in str(given):
        assert both["rope_scaling"]["factor"] == both["rope_parameters"]["factor"] == 2.0
    path.write_text(text)
    after = AutoConfig.from_pretrained(tmp_path)
    assert after.rope_parameters == before.rope_parameters
    assert both_spellings(tmp_path, text) == text
    assert load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("rope_type", ["default", "linear"])
def test_both_spellings_name_the_rotary_share(tmp_path: Path, rope_type: str) -> None:
    PhiConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_theta": 5e4, "partial_rotary_factor": 0.25, "rope_type": rope_type}
    config["rope_parameters"] = rope | ({"factor": 2.0} if rope_type == "linear" else {})
    path.write_text(json.dumps(config))
    both = json.loads(both_spellings(tmp_path, path.read_text()))
    assert (both["partial_rotary_factor"], both["rope_theta"]) == (0.25, 5e4)
    assert both.get("rope_scaling") == ({"rope_type": "linear", "factor": 2.0} if rope_type == "linear" else None)
    path.write_text(json.dumps(both))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config["rope_parameters"]
