"""KV heads within a budget: what single layers cost, the plan that comes out, and that it is what is then written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert import convert
from gqa_convert.conversion.head_plan import budget_bytes
from gqa_convert.conversion.plan import plan_source
from gqa_convert.conversion.recipe import Recipe, make_recipe
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.evaluate import allocation, kv_budget
from gqa_convert.evaluate.examples import causal_examples
from gqa_convert.evaluate.layer_estimates import estimated_costs
from gqa_convert.evaluate.scoring import score
from gqa_convert.evaluate.text import TokenStream, windows
from gqa_convert.hf.loading import Source, load_model
from tests import factories
from tests.support import Command

LAYERS = 3
BEFORE = LAYERS * 8 * 8 * 2 * 4  # 8 heads of 8 numbers, keys and values, in float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose middle layer has equal heads: it gives them up for nothing."""
    import transformers

    folder = tmp_path_factory.mktemp("allocation") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**factories.SIZES, "num_hidden_layers": LAYERS, "initializer_range": 0.3})
    random_model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for projection in (
            random_model.model.layers[1].self_attn.k_proj,
            random_model.model.layers[1].self_attn.v_proj,
        ):
            projection.weight.copy_(projection.weight[:8].repeat(8, 1))
    random_model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fraction of the time, and enough of this model."""
    monkeypatch.setattr(kv_budget, "WINDOWS", 4)


def test_sizes_are_read() -> None:
    assert budget_bytes("25%", 1000, lambda groups: 0) == 250
    assert budget_bytes("groups=2", 1000, lambda groups: 100 * groups) == 200
    assert budget_bytes("1.5KiB", 4096, lambda groups: 0) == 1536
    assert budget_bytes("2kB", 4096, lambda groups: 0) == 2000
    assert budget_bytes("700", 1000, lambda groups: 0) == 700
    for text in ("100%", "a quarter", "groups=", "-5", "12TB", "groups=8"):
        with pytest.raises(UsageError, match="--kv-budget"):
            budget_bytes(text, 1000, lambda groups: 1000)


def test_heads_are_given_up_where_that_costs_nothing(model: Path, tmp_path: Path) -> None:
    planned = kv_budget.plan_within(model, budget="75%", recipe=Recipe(), out=tmp_path / "out", work=tmp_path / "work")
    allocated = planned.allocation
    assert allocated is not None
    assert planned.layout_after.per_layer[1] == 1
    assert allocated["costs"][1]["1"]["kl"] < 1e-6 < min(allocated["costs"][n]["1"]["kl"] for n in (0, 2))
    assert (
        planned.kv_cache_bytes_per_token_after
        == allocated["kv_cache_bytes_per_token"]
        <= allocated["budget"]
        == BEFORE * 3 // 4
    )
    assert allocated["measured"]["kl"] <= allocated["first"]["kl"]


def test_estimates_are_the_divergence_of_small_changes(model: Path, tmp_path: Path) -> None:
    source = Source.open(model)
    plans = {count: plan_source(source, groups=count, target=tmp_path / "out", recipe=Recipe()) for count in (4, 1)}
    examples = kv_budget._examples(source, Recipe(), None)
    assembly = allocation.Assembly(plans, dict.fromkeys(plans), examples)
    # A thousandth of the way to the merged weights, where the second order is all that matters.
    tensors = assembly._tensors
    step = 1e-3
    state = {name: value.clone() for name, value in assembly._state.items()}
    assembly._tensors = lambda count, layer: {  # type: ignore[method-assign]
        name: state[name] + step * (tensor - state[name]) for name, tensor in tensors(count, layer).items()
    }
    wanted = [(layer, count) for layer in range(LAYERS) for count in (4, 1)]
    many = [estimated_costs(assembly, wanted, batch=4, seed=seed) for seed in range(8)]
    for each in wanted:
        measured = assembly.measure(dict([each])).kl
        estimated = sum(estimates[each].kl for estimates in many) / len(many)
        if each[0] == 1:  # equal heads
            assert max(measured, estimated) < 1e-9
        else:
            assert estimated == pytest.approx(measured, rel=0.5)
            assert many[0][each].error > 0


def test_estimated_costs_give_the_same_plan(model: Path, tmp_path: Path, command: Command) -> None:
    shared: dict[str, Any] = {"budget": "75%", "recipe": Recipe(), "out": tmp_path / "out"}
    planned = kv_budget.plan_within(model, costs_by="estimated", work=tmp_path / "work", **shared)
    assert planned.layout_after.per_layer[1] == 1
    assert planned.allocation is not None
    assert planned.allocation["costs_by"] == "estimated"
    assert planned.allocation["costs"][0]["1"]["loss"] is None
    assert planned.allocation["measured"]["loss"] is not None
    wrong = command("gqa-convert", model, "--kv-budget", "75%", "--kv-costs", "estimate")
    assert wrong.code == 2
    assert "did you mean estimated" in wrong.err


def test_the_assembled_model_is_the_one_that_is_written(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe("fast", sequences=4, length=32)
    work = tmp_path / "work"
    planned = kv_budget.plan_within(model, budget="groups=4", recipe=recipe, out=tmp_path / "out", work=work)
    assert planned.allocation is not None
    out = convert(model, groups=planned.layout_after.per_layer, recipe=recipe, out=tmp_path / "out", work=work).out
    ids = kv_budget._examples(Source.open(model), recipe, None)
    original, written = (load_model(Source.open(folder), dtype=torch.float32) for folder in (model, out))
    _, seen, _ = score(original, written, ids)
    assert seen is not None
    assert seen.mean("kl") == pytest.approx(planned.allocation["measured"]["kl"], rel=1e-3, abs=1e-6)


def test_what_was_measured_is_not_measured_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(budget: str) -> object:
        work = tmp_path / "work"
        return kv_budget.plan_within(
            model, budget=budget, recipe=Recipe(), out=tmp_path / "out", work=work, exchanges=0
        ).allocation

    first = choose("50%")
    calls: list[object] = []
    monkeypatch.setattr(allocation.Assembly, "measure", lambda self, counts: calls.append(counts))
    assert choose("50%") == first
    assert not calls
    (kept,) = (tmp_path / "work").glob("costs-*.json")
    values = json.loads(kept.read_text())
    values["0:1"] = "damaged"
    kept.write_text(json.dumps(values))
    monkeypatch.setattr(allocation.Assembly, "measure", lambda self, counts: allocation.Cost(0.5, 0.25))
    assert choose("50%")["costs"][0]["1"] == {"kl": 0.5, "loss": 0.25}


def test_a_layer_alone_is_put_in_and_taken_out(model: Path) -> None:
    from gqa_convert.conversion.plan import plan_source

    source = Source.open(model)
    plans = {1: plan_source(source, groups=1, target=Path("nowhere"), recipe=Recipe())}
    stream = TokenStream(list(range(3, 67)), [0] * 64)
    assembly = allocation.Assembly(plans, {1: None}, causal_examples(stream, windows(64, context=32, stride=32)))
    alone, all_of_them = assembly.measure({0: 1}), assembly.measure({0: 1, 1: 1, 2: 1})
    assert 0 < alone.kl < all_of_them.kl
    assert assembly.measure({0: 1}) == alone
    assert assembly.measure({}).kl == pytest.approx(0, abs=1e-9)


def test_constraints_hold_and_what_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"recipe": Recipe(), "out": tmp_path / "out", "work": tmp_path / "work", "exchanges": 0}
    kept = kv_budget.plan_within(model, budget="60%", keep_layers="1", tensor_parallel=2, **choices)
    assert kept.layout_after.per_layer[1] == 8
    assert min(kept.layout_after.per_layer) >= 2
    with pytest.raises(UsageError, match="the fewest KV heads that are allowed take"):
        kv_budget.plan_within(model, budget="10%", keep_layers="1", **choices)
    with pytest.raises(UsageError, match="no layer may have fewer"):
        kv_budget.plan_within(model, budget="10%", min_groups=8, **choices)
    with pytest.raises(UnsupportedModelError, match="each layer"):
        kv_budget.plan_within(factories.make(tmp_path / "qwen3", "qwen3"), budget="50%", **choices)


def test_the_command_chooses_writes_and_clears_up(model: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    done = command("gqa", "convert", model, "--kv-budget", "50%", "--out", out, "--no-measure")
    assert done.code == 0, done.err
    recorded = json.loads((out / "gqa_convert.json").read_text())["conversion"]
    counts = recorded["allocation"]["groups_per_layer"]
    assert recorded["after"].get("kv_heads_per_layer", [recorded["after"]["kv_heads"]] * LAYERS) == counts
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "predicted" in done.out
    both = command("gqa", "convert", model, "--kv-budget", "50%", "--groups", "2")
    assert (both.code, both.err.count("\n")) == (2, 1)
