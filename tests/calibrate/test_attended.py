from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gqa_convert.calibrate import session
from gqa_convert.calibrate.attention_received import attention_received
from gqa_convert.calibrate.hooks import part_of
from gqa_convert.calibrate.input_statistics import InputMoments
from gqa_convert.calibrate.solve import solve
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.tiny.forward import difference
from tests.calibrate.conftest import Case, Saved


def attention_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(("self_attn", "SelfAttention", "EncDecAttention", ".attention"))
    }


def run(model: Any, tokens: torch.Tensor, **more: Any) -> Any:
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :5]
    with torch.no_grad():
        return model(**inputs, use_cache=False, **more)


def eager_columns(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Column sums of the attention matrices that the eager path returns, of all modules as they run."""
    columns: list[torch.Tensor] = []
    before = model.config._attn_implementation

    def hook(_: Any, args: Any, out: Any) -> None:
        columns.append(out[-1].sum((1, 2)))

    handles = [module.register_forward_hook(hook) for module in attention_modules(model).values()]
    model.set_attn_implementation("eager")
    run(model, tokens, output_attentions=True)
    model.set_attn_implementation(before)
    for handle in handles:
        handle.remove()
    return columns


# a plain decoder, one whose heads share keys, one with a sliding window, one with a position bias and cross-attention
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {}), ("llama", {"num_heads": 4, "num_kv_heads": 2}), ("mistral", {}), ("t5", {}), ("gpt_neox", {})],
)
def test_what_is_received_is_the_column_sum_of_the_weights(
    model_type: str, sizes: dict[str, Any], saved: Callable[..., Saved], tokens: torch.Tensor
) -> None:
    model = saved(model_type, **sizes).model
    expected = eager_columns(model, tokens)
    modules = attention_modules(model)
    taken: list[torch.Tensor | None] = []
    with attention_received(modules.values()) as attended:
        handles = [
            module.register_forward_hook(lambda one, args, out: taken.append(attended.take(one)))
            for module in modules.values()
        ]
        run(model, tokens)
        for handle in handles:
            handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert len(taken) == len(expected) > 1
    for one, other in zip(taken, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_weights_that_a_module_returns_do_as_well(saved: Callable[..., Saved], tokens: torch.Tensor) -> None:
    model = saved("llama").model
    expected = eager_columns(model, tokens)
    modules = attention_modules(model)
    model.set_attn_implementation("eager")
    with attention_received(modules.values()) as attended:
        run(model, tokens)
        taken = [attended.take(module) for module in modules.values()]
    model.set_attn_implementation("sdpa")
    for one, other in zip(taken, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_outputs_stay_and_nothing_is_left_behind(saved: Callable[..., Saved], tokens: torch.Tensor) -> None:
    model = saved("llama").model
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = run(model, tokens).logits

    class Stop(Exception):
        pass

    def measured() -> None:
        with attention_received(attention_modules(model).values()):
            torch.testing.assert_close(run(model, tokens).logits, before)
            raise Stop

    with pytest.raises(Stop):
        measured()
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_token_counts_by_what_it_receives() -> None:
    x, received = torch.randn(2, 5, 3), torch.rand(2, 5)
    moments = InputMoments()
    moments.add(x, x, received)
    seen = moments.statistics()
    flat, weight = x.flatten(0, 1).double(), received.flatten().double()
    expected = torch.einsum("n,nx,ny->xy", weight, flat, flat) / weight.sum()
    assert seen.kv is not None
    torch.testing.assert_close(seen.kv.moment, expected)
    torch.testing.assert_close(seen.kv.mean, weight @ flat / weight.sum())
    torch.testing.assert_close(seen.moment, flat.T @ flat / 10)  # queries count alike


def test_received_alike_changes_nothing() -> None:
    x = torch.randn(2, 5, 3)
    plain, alike = InputMoments(), InputMoments()
    plain.add(x, x)
    alike.add(x, x, torch.full((2, 5), 0.7))
    statistics = alike.statistics().kv
    assert statistics is not None
    torch.testing.assert_close(statistics.moment, plain.statistics().moment)


@pytest.mark.parametrize("received", [torch.ones(2, 4), torch.zeros(2, 5)])
def test_another_number_of_tokens_or_no_attention_at_all_counts_alike(received: torch.Tensor) -> None:
    x = torch.randn(2, 5, 3)
    moments = InputMoments()
    moments.add(x, x, received)
    assert moments.statistics().kv is None


def solved(example: Any, work: Any, inputs: Any) -> Any:
    recipe = Recipe(method="pca", calibrate="text.txt")
    return solve(
        example.saved.checkpoint,
        example.anatomy,
        example.blocks,
        example.freedom,
        recipe,
        inputs,
        work=work,
    )


@pytest.mark.parametrize("quick", [False, True])
def test_solving_counts_tokens_by_attention(
    quick: bool, case: Callable[..., Case], tokens: torch.Tensor, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where layers run in bfloat16, within its rounding."""
    monkeypatch.setattr("gqa_convert.calibrate.quick.has_bfloat16", lambda kind: quick)
    example = case("llama")
    model, names = example.saved.model, example.blocks[0]
    read: list[torch.Tensor] = []
    handle = part_of(model, "", names.k).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    received = eager_columns(model, tokens)[0].flatten().double()
    handle.remove()
    x = read[0].flatten(0, 1).double()

    done = solved(example, work, tokens)

    (file,) = work.glob("moments-*/layer-00000.safetensors")
    kept = load_file(file)[f"{names.module}.kv.moment"]
    expected = (x.T * received) @ x / received.sum()
    if quick:
        assert 1e-6 < difference(kept, expected) < 1e-2
    else:
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)
    assert not [note for note in done.notes if "alike" in note]


def test_blocks_whose_attention_is_not_seen_are_named(
    case: Callable[..., Case], tokens: torch.Tensor, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = case("llama")
    monkeypatch.setattr(session, "attention_received", lambda modules: attention_received(()))
    (note,) = solved(example, work, tokens).notes
    assert all(names.module in note for names in example.blocks)
    assert "count alike" in note


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "opt", "t5", "bart", "gemma2"])
def test_attention_is_seen_in(model_type: str, case: Callable[..., Case], tokens: torch.Tensor, work: Path) -> None:
    example = case(model_type)
    inputs = {"input_ids": tokens}
    if example.saved.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :5]
    assert [note for note in solved(example, work, inputs).notes if "alike" in note] == []
