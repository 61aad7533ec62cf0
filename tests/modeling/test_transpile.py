"""Families that are written as another one: plans, configs, refusals, side by side with what commands print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqa_convert import convert, plan
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.contract.tying import average_heads
from gqa_convert.conversion.inspect import inspect, verify_pair
from gqa_convert.conversion.recipe import make_recipe
from gqa_convert.conversion.routes import routed
from gqa_convert.errors import CheckpointError, UnsupportedModelError, UsageError
from gqa_convert.hf.loading import Source
from gqa_convert.modeling.transpile.rule import all_rules
from gqa_convert.tiny.forward import difference, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config
from tests.support import Command

WHOLE_HEADS = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}
FAMILIES = ["gpt_neox", "gptj", "codegen", "gpt2", "opt"]


def saved(folder: Path, model_type: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny random model of a family, saved as it would be on the hub."""
    model = tiny_model(tiny_config(model_type, changes=changes))
    model.to(dtype).save_pretrained(folder)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def edit_config(folder: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    config = {key: value for key, value in config_of(folder).items() if key not in remove} | values
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_every_rule_has_its_family_and_says_why() -> None:
    rules = all_rules()
    assert {name for rule in rules.values() for name in rule.sources} >= set(FAMILIES)
    assert all(rule.why and rule.target_class for rule in rules.values())


def test_the_plan_says_what_it_becomes_and_why(tmp_path: Path, command: Command) -> None:
    saved(tmp_path / "pythia", "gpt_neox", dtype=torch.bfloat16)
    planned = plan(tmp_path / "pythia", groups=2)
    assert (planned.model_type, planned.class_name, planned.route) == ("gpt_neox", "GPTNeoXForCausalLM", "native")
    assert planned.becomes.startswith("PhiForCausalLM (phi), because ")
    assert any("rounded once to BF16" in note for note in planned.notes)
    assert planned.bytes_in == Checkpoint.open(tmp_path / "pythia").total_bytes
    printed = command("gqa", "plan", tmp_path / "pythia", "--groups", 2).out
    assert "becomes" in printed
    assert "PhiForCausalLM (phi), because" in printed
    assert json.loads(command("gqa", "plan", tmp_path / "pythia", "--groups", 2, "--json").out)["route"] == "native"
    done = command("gqa-convert", tmp_path / "pythia", "--groups", 2)
    assert "tensors fill the PhiForCausalLM of config.json" in done.out


@pytest.mark.parametrize(
    ("parallel", "share", "becomes"),
    [(True, 1.0, "phi"), (True, 0.25, "phi"), (False, 1.0, "starcoder2"), (False, 0.5, "nemotron")],
)
def test_the_form_of_a_neox_decides_what_it_becomes(parallel: bool, share: float, becomes: str, tmp_path: Path) -> None:
    saved(
        tmp_path / "source",
        "gpt_neox",
        use_parallel_residual=parallel,
        hidden_dropout=0.1,
        rope_parameters=WHOLE_HEADS | {"partial_rotary_factor": share},
    )
    done = convert(tmp_path / "source", groups=2, out=tmp_path / "out")
    assert config_of(tmp_path / "out")["model_type"] == becomes
    assert any("hidden_dropout=0.1 is lost" in note for note in done.plan.notes) == (becomes == "nemotron")


def test_a_family_with_a_setting_takes_no_other_route(tmp_path: Path) -> None:
    saved(tmp_path / "llama", "llama")
    planned = plan(tmp_path / "llama", groups=2)
    assert (planned.route, planned.becomes, planned.rewritten_tensors) == ("setting", "", 0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_verified_against_the_stored_model(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path / "source", model_type)
    groups = 1 if model_type in ("gpt2", "opt") else 2
    done = convert(tmp_path / "source", groups=groups, out=tmp_path / "out", verify="logits")
    assert done.checks["transpiling_difference"] <= 1e-5 * done.checks["logit_scale"]
    assert done.checks["transpiling_rounding"] == done.checks["transpiling_difference"]
    checks = verify_pair(tmp_path / "source", tmp_path / "out")
    assert checks["differing"] == []


def test_half_precision_rounds_once_and_says_how_far(tmp_path: Path) -> None:
    saved(tmp_path / "source", "gpt_neox", dtype=torch.bfloat16)
    done = convert(tmp_path / "source", groups=8, out=tmp_path / "out", verify="logits")
    assert done.checks["transpiling_difference"] <= 1e-5 * done.checks["logit_scale"]
    assert 0 < done.checks["transpiling_rounding"] <= 0.02 * done.checks["logit_scale"]
    assert {t.dtype for t in Checkpoint.open(tmp_path / "out").tensors.values()} == {"BF16"}


def test_a_rule_that_is_wrong_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_convert.errors import VerificationError
    from gqa_convert.modeling.transpile.rules import codegen

    saved(tmp_path / "source", "codegen")
    monkeypatch.setattr(codegen, "_ORDER", {"q_proj": 0, "k_proj": 1, "v_proj": 2})
    with pytest.raises(VerificationError, match="written as phi, its logits differ"):
        convert(tmp_path / "source", groups=2, out=tmp_path / "out", verify="logits")
    assert not (tmp_path / "out").exists()


def test_calibrated_merges_work_on_the_other_family(tmp_path: Path) -> None:
    saved(tmp_path / "source", "gpt_neox")
    recipe = make_recipe(
        "fast", method=None, grouping=None, calibrate="self", sequences=4, length=8, fold=None, max_context=None,
        refit=True, refit_steps=0, refit_tokens=None, refit_lr=None, seed=0,
    )  # fmt: skip
    done = convert(tmp_path / "source", groups=2, out=tmp_path / "out", recipe=recipe, verify="logits")
    assert done.plan.solved_tensors == 2 * 8
    assert config_of(tmp_path / "out")["model_type"] == "phi"


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("parallel", [True, False])
def test_real_pythia_spellings(parallel: bool, groups: int, tmp_path: Path) -> None:
    """Old config keys, `embed_out`, the buffers that old releases stored, shards of .bin files."""
    model = saved(tmp_path / "new", "gpt_neox", use_parallel_residual=parallel)
    old = tmp_path / "old"
    old.mkdir()
    values = config_of(tmp_path / "new")
    rope = values.pop("rope_parameters")
    values |= {
        "rotary_pct": rope["partial_rotary_factor"],
        "rotary_emb_base": 10000,
        "torch_dtype": values.pop("dtype"),
    }
    (old / "config.json").write_text(json.dumps(values))
    state = load_file(tmp_path / "new" / "model.safetensors")
    assert "embed_out.weight" in state
    for layer in range(2):
        path = f"gpt_neox.layers.{layer}.attention"
        state[f"{path}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"{path}.masked_bias"] = torch.tensor(-1e9)
        state[f"{path}.rotary_emb.inv_freq"] = torch.ones(1)
    names = sorted(state)
    halves = [names[::2], names[1::2]]
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for file, keys in zip(files, halves, strict=True):
        torch.save({key: state[key] for key in keys}, old / file)
    index = {"metadata": {}, "weight_map": {k: f for f, keys in zip(files, halves, strict=True) for k in keys}}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    done = convert(old, groups=groups, out=tmp_path / "out")
    assert any("6 stored tensors" in note for note in done.plan.notes)
    average_heads(model, groups)
    inputs = text_inputs(model)
    assert difference(logits(model, inputs), logits(load(tmp_path / "out"), inputs)) <= 1e-5


def test_the_config_is_written_in_old_and_new_spellings(tmp_path: Path) -> None:
    saved(tmp_path / "source", "gpt_neox", hidden_act="gelu_fast", hidden_dropout=0.25)
    rope = {"rope_theta": 5e4, "partial_rotary_factor": 0.5, "rope_type": "linear", "factor": 2.0}
    edit_config(tmp_path / "source", rope_parameters=rope, eos_token_id=7)
    convert(tmp_path / "source", groups=2, out=tmp_path / "out", verify="logits")
    config = config_of(tmp_path / "out")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e4
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (config["hidden_act"], config["resid_pdrop"], config["embd_pdrop"]) == ("gelu_fast", 0.25, 0.25)
    assert (config["eos_token_id"], config["num_key_value_heads"]) == (7, 2)
    assert config["tokenizer_class"] == "GPTNeoXTokenizer"


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
        ("gpt_neox", {"use_parallel_residual": False, "rope_parameters": WHOLE_HEADS}),
        ("gpt_neox", {"use_parallel_residual": False, "rope_parameters": WHOLE_HEADS, "attention_bias": False}),
        ("gptj", {"n_inner": 48, "rotary_dim": 8}),
        ("codegen", {"tie_word_embeddings": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80, "scale_attn_weights": False}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
    ],
)
def test_forms_of_a_family(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", groups=1, out=tmp_path / "out")
    average_heads(model, 1)
    inputs = text_inputs(model)
    assert difference(logits(model, inputs), logits(load(tmp_path / "out"), inputs)) <= 1e-5


def test_gpt2_keys_without_a_prefix(tmp_path: Path) -> None:
    """The hub's gpt2 was saved from the base model and holds its mask buffers."""
    model = saved(tmp_path / "source", "gpt2")
    state = load_file(tmp_path / "source" / "model.safetensors")
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "source", groups=1, out=tmp_path / "out", verify="logits")
    average_heads(model, 1)
    inputs = text_inputs(model)
    assert difference(logits(model, inputs), logits(load(tmp_path / "out"), inputs)) <= 1e-5


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=false"),
        ("opt", {"_remove_final_layer_norm": True}, "no last LayerNorm"),
        ("gptj", {"rotary_dim": 3}, "rotary_dim=3"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gpt_neox", {"architectures": ["GPTNeoXForSequenceClassification"]}, "GPTNeoXForSequenceClassification"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    model_type: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    saved(tmp_path / "source", model_type)
    edit_config(tmp_path / "source", **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        plan(tmp_path / "source", groups=1, route="native")


def test_groups_that_the_target_cannot_hold_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "source", "opt")
    with pytest.raises(UnsupportedModelError, match="gpt_bigcode, which has 1 or 8 KV heads"):
        plan(tmp_path / "source", groups=2, route="native")
    with pytest.raises(UsageError, match="Choose one of 1, 2, 4, 8"):
        plan(tmp_path / "source", groups=3)
    inspected = inspect(tmp_path / "source")
    assert {1, 8} <= set(inspected.legal_groups)
    assert inspected.becomes.startswith("GPTBigCodeForCausalLM (gpt_bigcode) with --groups 1, because")


def test_auto_is_native_where_that_is_exact_and_else_shipped_code(tmp_path: Path) -> None:
    saved(tmp_path / "source", "gpt2")
    assert [plan(tmp_path / "source", groups=g).route for g in (1, 2, 8)] == ["native", "remote-code", "remote-code"]
    assert plan(tmp_path / "source", groups=1, route="remote-code").becomes == ""
    with pytest.raises(UnsupportedModelError, match="gpt_bigcode, which has 1 or 8 KV heads"):
        plan(tmp_path / "source", groups=2, route="native")
    assert inspect(tmp_path / "source").legal_groups == (1, 2, 4, 8)
    convert(tmp_path / "source", groups=1, out=tmp_path / "out", route="remote-code")
    assert verify_pair(tmp_path / "source", tmp_path / "out", trust_remote_code=True)["differing"] == []


def test_no_stock_family_computes_what_t5_does(tmp_path: Path) -> None:
    saved(tmp_path / "source", "t5")
    with pytest.raises(UnsupportedModelError, match="--route native: no stock family"):
        plan(tmp_path / "source", groups=2, route="native")


def test_unknown_and_missing_routes(tmp_path: Path, command: Command) -> None:
    saved(tmp_path / "source", "gptj")
    with pytest.raises(UsageError, match="--route sideways: choose one of auto, native, remote-code"):
        plan(tmp_path / "source", groups=1, route="sideways")
    assert "--route remote-code" in command("gqa", "plan", tmp_path / "source", "-g", 1, "--route", "remote-code").err


def test_tensors_that_would_be_lost_missing_or_misshapen(tmp_path: Path) -> None:
    saved(tmp_path / "source", "gptj")
    file = tmp_path / "source" / "model.safetensors"
    state = load_file(file)
    short = {key: x for key, x in state.items() if key != "transformer.h.1.mlp.fc_in.bias"}
    save_file(short, file)
    with pytest.raises(CheckpointError, match=r"lack transformer\.h\.1\.mlp\.fc_in\.bias"):
        plan(tmp_path / "source", groups=1)
    save_file(state | {"transformer.ln_f.weight": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight has shape"):
        plan(tmp_path / "source", groups=1)
    save_file(state | {"transformer.h.0.attn.q_proj.weight": torch.ones(64, 64, dtype=torch.int8)}, file)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        plan(tmp_path / "source", groups=1)


def test_provenance_names_the_source_and_the_route(tmp_path: Path) -> None:
    saved(tmp_path / "source", "codegen")
    convert(tmp_path / "source", groups=2, out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "gqa_convert.json").read_text())["conversion"]
    assert (record["model_type"], record["route"]) == ("codegen", "native")
    assert "PhiForCausalLM" in record["becomes"]
    assert "auto_map" not in config_of(tmp_path / "out")


def test_a_tokenizer_that_would_not_be_found_is_noted(tmp_path: Path) -> None:
    saved(tmp_path / "source", "opt")
    (tmp_path / "source" / "vocab.json").write_text("{}")
    assert any("tokenizer.json" in note for note in plan(tmp_path / "source", groups=1).notes)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    assert not any("tokenizer.json" in note for note in plan(tmp_path / "source", groups=1).notes)


def test_sharded_sources_keep_their_shards(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("gpt_neox"))
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    convert(tmp_path / "source", groups=2, out=tmp_path / "out")
    weights = [sorted(p.name for p in (tmp_path / name).glob("*.safetensors")) for name in ("source", "out")]
    assert weights[0] == weights[1]
    assert len(weights[0]) > 2
    average_heads(model, 2)
    inputs = text_inputs(model)
    assert difference(logits(model, inputs), logits(load(tmp_path / "out"), inputs)) <= 1e-5


def test_a_view_reads_its_copies_from_the_sources_bytes(tmp_path: Path) -> None:
    saved(tmp_path / "source", "gpt_neox")
    view = routed(Source.open(tmp_path / "source")).checkpoint
    assert view.stored is not None
    fc2, stored = view.tensors["model.layers.0.mlp.fc2.weight"], view.stored.tensors
    original = stored["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"]
    assert (fc2.offset, fc2.file, fc2.load) == (original.offset, original.file, None)
    assert torch.equal(view.tensor(fc2.key), view.stored.tensor(original.key))
