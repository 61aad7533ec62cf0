"""Models of the shipped kind: strangers load them, they decode as they should, and saving keeps their code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gqa_convert import convert, plan
from gqa_convert.contract.native import prove
from gqa_convert.contract.remote_code import leave_inputs, meet_strangers
from gqa_convert.conversion.inspect import inspect, verify_pair
from gqa_convert.conversion.verify import verify_output
from gqa_convert.errors import UnsupportedModelError, UsageError, VerificationError
from gqa_convert.tiny.forward import cache_head_counts, cached_logits, difference, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config
from tests.modeling.conftest import Make

T5 = ("t5", "t5v1.1")


# One of each way in which families lay out projections, name their parts and nest their decoder.
SPREAD = (
    "t5",
    "bart",
    "bert",  # a decoder only where its configuration says so
    "ctrl",
    "florence2",  # composite, keys that loading renames
    "gpt2",  # one fused (in, out) projection
    "m2m_100",
    "marian",  # positions that are computed anew
    "nllb-moe",
    "opt",  # a forward pass that insists on as many KV heads as query heads
    "persimmon",  # the same, with a fused projection
    "pix2struct",
    "umt5",  # the same, with cross-attention
    "seamless_m4t",  # several decoders, of which one writes text
    "whisper",  # keys without bias, a field name that means the encoder's heads
)


def load(folder: Path, auto: str = "AutoModelForSeq2SeqLM") -> Any:
    return getattr(transformers, auto).from_pretrained(folder).eval()


def test_strangers_load_converted_and_saved_again(make: Make, tmp_path: Path) -> None:
    folders = [
        make("t5", 2),
        make("t5v1.1", 2, 4),
        make("mt5", 1),
        make("bart", 2),
        make("gpt2", 2),
        make("whisper", 4),
    ]
    count = len(folders)
    for folder in folders[:]:
        auto = [name for name in json.loads((folder / "config.json").read_text())["auto_map"] if "ModelFor" in name]
        model = load(folder, *auto)
        inputs = text_inputs(model)
        again = tmp_path / f"{folder.name}-saved"
        model.save_pretrained(again)
        for each in (folder, again):
            leave_inputs(each, inputs, logits(model, inputs))
        folders.append(again)
    assert meet_strangers(folders, tmp_path / "modules") == [""] * 2 * count


def test_auto_classes_know_them_once_the_package_is_imported(make: Make) -> None:
    code = (
        "import sys, gqa_convert; assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "from transformers import AutoConfig; from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        f"config = AutoConfig.from_pretrained({str(make('t5', 2))!r})\n"
        "assert 'gqa_nonsense' not in CONFIG_MAPPING and 'gqa_llama' not in CONFIG_MAPPING\n"
        "sys.stdout.write(f'{type(config).__module__} {config.num_key_value_heads}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "gqa_convert.modeling.modeling_gqa 2"


@pytest.mark.parametrize("model_type", SPREAD)
def test_the_contract_holds(model_type: str, tmp_path: Path) -> None:
    record = prove(model_type, tmp_path)
    assert record.proven, record.reason


@pytest.mark.parametrize("name", T5)
@pytest.mark.parametrize(("groups", "cross_groups"), [(1, None), (2, 4), (8, 2)])
def test_caches_hold_the_groups_of_each_attention(make: Make, name: str, groups: int, cross_groups: int | None) -> None:
    model = load(make(name, groups, cross_groups))
    inputs = text_inputs(model)
    stepped, cache = cached_logits(model, inputs)
    assert cache_head_counts(cache) == [groups] * 2 + [cross_groups or groups] * 2
    assert difference(logits(model, inputs), stepped) < 1e-4


@pytest.mark.parametrize("name", [*T5, "umt5", "opt", "gpt2"])
def test_generation_is_the_same_however_it_is_cached(make: Make, name: str) -> None:
    model = load(make(name, 2), "AutoModelForCausalLM") if name in ("opt", "gpt2") else load(make(name, 2, 1))
    inputs = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))

    def text(**choices: Any) -> list[list[int]]:
        tokens = model.generate(inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **choices)
        ids: list[list[int]] = tokens.tolist()
        return ids

    greedy = text()
    assert text(use_cache=False) == greedy
    assert text(cache_implementation="static") == greedy
    assert text(num_beams=3) == text(num_beams=3, use_cache=False)


@pytest.mark.parametrize("name", T5)
def test_encoder_and_output_layer_are_left_alone(make: Make, name: str) -> None:
    before, after = load(make(name)).state_dict(), load(make(name, 2)).state_dict()
    differing = {key for key in before if before[key].shape != after[key].shape}
    assert differing
    assert all(key.startswith("decoder.") and key[-9:] in (".k.weight", ".v.weight") for key in differing)
    same = before.keys() - differing
    assert all(torch.equal(before[key], after[key]) for key in same)


def test_plan_says_what_it_becomes_and_what_it_saves(make: Make) -> None:
    planned = plan(make("t5"), groups=2, cross_groups=1)
    assert (planned.layout_after.num_kv_heads, planned.cross_groups, planned.max_tensor_parallel) == (2, 1, 1)
    assert planned.config_edits["model_type"] == "gqa_t5"
    assert "modeling_gqa.py" in planned.side_files
    assert any("trust_remote_code" in note for note in planned.notes)
    # two layers of 8 heads of 8, keys and values, self and cross, in float32: 2048 bytes, of which a half is cross
    assert planned.kv_cache_bytes_per_token_before == 2 * 8 * 8 * 2 * 2 * 4
    assert planned.kv_cache_bytes_per_token_after == 1024 * 2 // 8 + 1024 // 8
    partial = plan(make("t5"), groups=8, cross_groups=1)
    assert (partial.kv_cache_bytes_per_token_before, partial.kv_cache_bytes_per_token_after) == (2048, 1024 + 128)


def test_groups_of_cross_attention_are_recorded_and_verified(make: Make) -> None:
    folder = make("t5", 2, 4)
    conversion = json.loads((folder / "gqa_convert.json").read_text())["conversion"]
    assert (conversion["after"]["kv_heads"], conversion["cross_groups"]) == (2, 4)
    checks = verify_pair(make("t5"), folder, logits=True)
    assert (checks["merged"], checks["differing"]) == (8, [])
    assert inspect(folder).layout.num_kv_heads == 2


def test_impossible_cross_groups_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--cross-groups 3: 8 heads .* Choose one of 1, 2, 4, 8"):
        plan(make("t5"), groups=2, cross_groups=3)


def test_a_converted_folder_can_be_converted_again(make: Make, tmp_path: Path) -> None:
    convert(make("t5", 4), groups=2, out=tmp_path / "again", verify="logits")
    direct, twice = (load(folder).state_dict() for folder in (make("t5", 2), tmp_path / "again"))
    for key, tensor in direct.items():
        torch.testing.assert_close(twice[key], tensor)
    assert (tmp_path / "again" / "modeling_gqa.py").is_file()


@pytest.mark.parametrize("name", ["gpt2", "persimmon", "bloom"])
def test_fused_projections_can_be_converted_again(make: Make, name: str, tmp_path: Path) -> None:
    convert(make(name, 4), groups=2, out=tmp_path / "again", route="remote-code", verify="logits", allow_slow=True)
    direct, twice = (load_file(each / "model.safetensors") for each in (make(name, 2), tmp_path / "again"))
    assert direct.keys() == twice.keys()
    for key, tensor in direct.items():
        torch.testing.assert_close(twice[key], tensor)
    assert inspect(make(name, 4)).legal_groups == (1, 2, 4)


@pytest.mark.parametrize(("groups", "cross_groups"), [(2, 4), (4, 2), (8, 2)])
def test_fused_projections_are_not_taken_for_cross_attention(groups: int, cross_groups: int, tmp_path: Path) -> None:
    tiny_model(tiny_config("gpt2", changes={"add_cross_attention": True})).save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", groups=groups, cross_groups=cross_groups, out=tmp_path / "out", verify="logits")
    before, after = (load_file(each / "model.safetensors") for each in (tmp_path / "source", done.out))
    key = "transformer.h.1.crossattention.c_attn.weight"  # [k | v], 8 heads of 8 each; not run on text alone
    heads = before[key].reshape(64, 2, cross_groups, 8 // cross_groups, 8)
    torch.testing.assert_close(after[key], heads.mean(dim=3).reshape(64, -1))


def test_an_encoder_is_refused(make: Make, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    T5EncoderModel.from_pretrained(make("t5")).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UnsupportedModelError, match="has no decoder, and encoders keep no KV cache"):
        convert(tmp_path / "encoder", groups=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_reaches_the_narrow_projections(make: Make) -> None:
    model = load(make("t5", 2)).train()
    model.activation_checkpointing_enable()
    ids = torch.randint(4, 64, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    narrow = model.decoder.block[0].layer[1].EncDecAttention.k.weight
    assert narrow.grad is not None
    assert float(narrow.grad.abs().max()) > 0


def test_a_tokenizer_that_went_by_the_model_type_is_named(make: Make, tmp_path: Path) -> None:
    source = tmp_path / "gpt2"
    shutil.copytree(make("gpt2"), source)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    assert plan(source, groups=2).config_edits["tokenizer_class"] == "GPT2Tokenizer"
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "tokenizer_class" not in plan(source, groups=2).config_edits


def test_what_keeps_no_cache_or_groups_is_refused(make: Make, tmp_path: Path) -> None:
    for name, change, why in (
        ("bert", {"is_decoder": False}, "it is an encoder"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    ):
        source = tmp_path / name
        shutil.copytree(make(name), source)
        values = json.loads((source / "config.json").read_text()) | change
        (source / "config.json").write_text(json.dumps(values))
        with pytest.raises(UnsupportedModelError, match=why):
            plan(source, groups=2)


@pytest.mark.parametrize("name", ["whisper", "pix2struct", "bart"])
def test_logits_are_verified_whatever_the_encoder_takes(make: Make, name: str, tmp_path: Path) -> None:
    done = convert(make(name), groups=2, cross_groups=4, out=tmp_path / "out", verify="logits")
    assert done.checks["logit_difference"] <= 1e-5 * done.checks["logit_scale"]
    file = tmp_path / "out" / "model.safetensors"
    state, wrong = load_file(file), done.plan.anatomy.merges[-1].key
    save_file(state | {wrong: state[wrong].flip(0).contiguous()}, file, {"format": "pt"})
    with pytest.raises(VerificationError, match="logits differ"):
        verify_output(done.plan, done.out, level="logits")


def test_a_transformers_that_registers_otherwise_is_said_aloud() -> None:
    from types import SimpleNamespace

    from gqa_convert.modeling import auto

    with pytest.warns(UserWarning, match="only with trust_remote_code=True"):
        auto._offer(SimpleNamespace(CONFIG_MAPPING=object()))
