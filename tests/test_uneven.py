"""A number of KV heads for each layer: what can be asked for, what is written and recorded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_convert import convert, plan
from gqa_convert.conversion.head_plan import asked_groups, kept_layers, legal_counts, planned_groups, read_groups
from gqa_convert.conversion.inspect import inspect, verify_pair
from gqa_convert.conversion.recipe import make_recipe
from gqa_convert.errors import UnsupportedModelError, UsageError, VerificationError
from gqa_convert.heads import HeadPlan
from gqa_convert.hf.loading import Source, load_model
from gqa_convert.modeling import modeling_uneven, uneven
from tests import factories
from tests.support import Command, tree

FFN = 256  # what engines take


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.make(tmp_path_factory.mktemp("uneven") / "llama", "llama")


def test_numbers_and_files_are_read(tmp_path: Path) -> None:
    assert read_groups("8, 4,2").counts == (8, 4, 2)
    for number, text in enumerate(("[8, 2]", '{"groups_per_layer": [8, 2], "more": 1}')):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        assert read_groups(str(file)).counts == (8, 2)


@pytest.mark.parametrize("text", ["[8, 2.5]", "[true]", "[]", '{"a": 1}', "[8", '"8"', "[0, 1]"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(UsageError):
        read_groups(str(file))
    with pytest.raises(UsageError, match="neither numbers"):
        read_groups("8,two")


def test_one_of_the_two_options_is_needed() -> None:
    assert asked_groups(4, None) == 4
    for choices in ((None, None), (4, "8,4")):
        with pytest.raises(UsageError, match="--groups"):
            asked_groups(*choices)


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_kept_layers_are_those_named(layers: int, data: st.DataObject) -> None:
    some = data.draw(st.sets(st.integers(0, layers - 1)))
    assert kept_layers(",".join(map(str, some)), layers) == some
    assert kept_layers("first, LAST", layers) == {0, layers - 1}
    start = data.draw(st.integers(0, layers - 1))
    assert kept_layers(f"{start}-{layers - 1}", layers) == set(range(start, layers))


@pytest.mark.parametrize("text", ["4", "2-1", "middle", "-1", "0-9"])
def test_layers_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--keep-layers"):
        kept_layers(text, 4)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 3, 6, 8, 12]), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_legal_counts_honour_constraints(present: int, devices: int, least: int) -> None:
    counts = legal_counts(present, tensor_parallel=devices, min_groups=least)
    assert counts[-1] == present
    assert all(present % count == 0 for count in counts)
    assert all(count % devices == 0 and count >= least for count in counts[:-1])


def test_constraints_name_the_layer() -> None:
    assert planned_groups(2, (8, 8, 8), keep_layers="first") == HeadPlan((8, 2, 2))
    assert planned_groups(2, (8, 8)) == 2
    assert planned_groups(HeadPlan((2, 2)), (8, 8)) == 2  # the same in every layer is no plan of its own
    with pytest.raises(UsageError, match="--tp 4: layer 1 would have 2"):
        planned_groups(HeadPlan((8, 2)), (8, 8), tensor_parallel=4)
    with pytest.raises(UsageError, match="--min-groups 4: layer 0 would have 1"):
        planned_groups(HeadPlan((1, 8)), (8, 8), min_groups=4)
    with pytest.raises(UsageError, match="3 layers, but the decoder has 2"):
        planned_groups(HeadPlan((1, 8, 8)), (8, 8))


def test_a_plan_is_written_recorded_and_verified(source: Path, tmp_path: Path) -> None:
    before = tree(source)
    out = convert(source, groups=[8, 2], out=tmp_path / "out", verify="logits").out
    values = json.loads((out / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert [block["attention"]["n_heads_in_group"] for block in values["block_configs"]] == [1, 4]
    assert values["num_key_value_heads"] is None
    recorded = json.loads((out / "gqa_convert.json").read_text())["conversion"]["after"]
    assert (recorded["kv_heads"], recorded["kv_heads_per_layer"]) == (8, [8, 2])
    checks = verify_pair(source, out, logits=True)
    assert (checks["merged"], checks["differing"]) == (2, [])
    inspected = inspect(out)
    # heads of 8 numbers, keys and values, in float32: 10 heads of 16
    assert (inspected.layout.per_layer, inspected.cache[-1][:2]) == ((8, 2), (8, 10 * 8 * 2 * 4))
    assert tree(source) == before
    assert read_groups(str(out / "gqa_convert.json")).counts == (8, 2)


def test_a_folder_that_says_other_heads_is_told(source: Path, tmp_path: Path) -> None:
    out = convert(source, groups=[8, 2], out=tmp_path / "out").out
    record = json.loads((out / "gqa_convert.json").read_text())
    record["conversion"]["after"]["kv_heads_per_layer"] = [2, 8]
    (out / "gqa_convert.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match="reads"):
        verify_pair(source, out)


def test_strangers_load_it_and_decode(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = convert(source, groups=[4, 1], out=tmp_path / "out").out
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, load_model(Source.open(out))(ids).logits)

    def text(**choices: object) -> list[list[int]]:
        written: list[list[int]] = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **choices
        ).tolist()
        return written

    assert text() == text(use_cache=False) == text(cache_implementation="static")
    assert text(num_beams=3) == text(num_beams=3, use_cache=False)


def test_fewer_heads_again(source: Path, tmp_path: Path) -> None:
    first = convert(source, groups=[8, 2], out=tmp_path / "first").out
    planned = plan(first, groups=[4, 2])
    assert (planned.layout_before.per_layer, planned.layout_after.per_layer) == ((8, 2), (4, 2))
    assert (planned.kv_cache_bytes_per_token_before, planned.kv_cache_bytes_per_token_after) == (640, 384)
    second = convert(first, groups=4, out=tmp_path / "second", verify="logits").out
    assert inspect(second).layout.per_layer == (4, 2)  # a layer that has fewer keeps its two
    assert verify_pair(first, second)["merged"] == 2
    with pytest.raises(UsageError, match=r"layer 1 has 2 KV heads, which cannot become 4\..*only ever lowers"):
        plan(first, groups=[8, 4])


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_presets_solve_the_layers_that_change(source: Path, tmp_path: Path, preset: str) -> None:
    recipe = make_recipe(preset, sequences=4, length=32, **({"refit_steps": 3} if preset == "best" else {}))
    out = convert(source, groups=[8, 2], out=tmp_path / "out", recipe=recipe, verify="logits").out
    checks = verify_pair(source, out)
    assert (checks["solved"], checks["recorded_hash"]) == (4, 4)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "llama-head-dim", "gemma"])
def test_other_families_are_refused(tmp_path: Path, family: str) -> None:
    folder = factories.make(tmp_path / "source", family)
    with pytest.raises(UnsupportedModelError, match="each layer") as refused:
        plan(folder, groups=[8, 2])
    assert refused.value.exit_code == 5
    assert plan(folder, groups=[2, 2]).groups == 2  # the same in every layer is what any family can


def test_the_command_line_says_it_in_one_line(source: Path, tmp_path: Path, command: Command) -> None:
    done = command(
        "gqa", "convert", source, "--groups", "2", "--keep-layers", "last", "--out", tmp_path / "out", "--no-measure"
    )
    assert done.code == 0, done.err
    assert "2, 8" in done.out
    for choices, said in (
        (["--groups-per-layer", "8,3"], "layer 1 has 8 KV heads, which cannot become 3"),
        (["--groups-per-layer", "8"], "1 layers, but the decoder has 2"),
        (["--groups", "2", "--min-groups", "4"], "--min-groups 4: layer 0"),
        ([], "--groups"),
    ):
        refused = command("gqa", "plan", source, *choices)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert said in refused.err


@settings(deadline=None)
@given(st.integers(1, 64).map(lambda n: 256 * n), st.integers(1, 128).map(lambda n: 32 * n))
def test_engines_get_the_feed_forward_size_back(size: int, width: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=size, num_attention_heads=4, num_hidden_layers=1
    )
    (block,) = uneven.block_configs(config, [2])
    assert modeling_uneven.ffn_size(block["ffn"], width) == size


@pytest.mark.parametrize(
    ("part", "change"),
    [("attention", {"no_op": True}), ("attention", {"n_heads_in_group": 3}), ("ffn", {"intermediate_size": 7})],
)
def test_blocks_that_the_code_does_not_know_are_refused(part: str, change: dict[str, object]) -> None:
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
    blocks = uneven.block_configs(config, [2])
    blocks[0][part] |= change
    with pytest.raises(ValueError, match="block_configs"):
        modeling_uneven.DeciLMConfig(**{**config.to_dict(), "model_type": "nemotron-nas", "block_configs": blocks})
