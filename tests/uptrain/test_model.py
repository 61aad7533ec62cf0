from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from gqa_convert.errors import UsageError
from gqa_convert.uptrain.model import (
    ScoredModel,
    attention_linears,
    can_skip_head,
    check_isolation,
    run_model,
    set_dropout,
    teacher_dtype,
)
from gqa_convert.uptrain.objective import LossSpec
from gqa_convert.uptrain.unused_parameters import freeze_unreached


def build(name: str, attention: str = "sdpa", **more: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**more)
    cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    torch.manual_seed(0)
    return cls._from_config(config, attn_implementation=attention).eval()


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**SMALL, "num_key_value_heads": 2},
    "Qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoX": SMALL,
    "Gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60},
    "OPT": {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60,
            "word_embed_proj_dim": 32},
}  # fmt: skip


FLEX = pytest.param("flex_attention", marks=pytest.mark.slow)  # compiles for half a minute


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLEX])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPTNeoX", "Gemma2"])
def test_documents_are_kept_apart_on_every_backend(name: str, attention: Any) -> None:
    if name == "Gemma2" and attention != "eager":
        pytest.skip("Gemma 2 runs on eager attention only")
    assert check_isolation(build(name, attention, **MODELS[name])) < 1e-4


def flash_on_a_cpu(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What flash kernels do and demand: 16 bits, one row, documents told apart by restarting positions."""
    from transformers.integrations.flash_attention import get_target_dtype

    target = get_target_dtype(query, module)
    if target is not None:
        query, key, value = (x.to(target) for x in (query, key, value))
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    assert attention_mask is None
    length = query.shape[2]
    document = (position_ids == 0).cumsum(-1) if position_ids is not None else torch.zeros(1, length)
    assert query.shape[0] == 1 or position_ids is None or int(document.max()) == 1
    seen = (document[:, :, None] == document[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen[:, None], scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash() -> Iterator[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("flash_on_a_cpu", flash_on_a_cpu)
    yield "flash_on_a_cpu"
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("flash_on_a_cpu")


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPTNeoX"])
def test_float32_weights_are_tried_out_under_flash_attention_in_16_bits(flash: str, name: str) -> None:
    model = build(name, "eager", **MODELS[name])
    model.config._attn_implementation = flash  # by its name alone transformers would look for the real thing
    assert 0 <= check_isolation(model) < 5e-2
    assert can_skip_head(model)
    assert freeze_unreached(ScoredModel(model.train(), LossSpec()), print) == []
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        model(torch.randint(3, 59, (1, 9)))


def test_a_mask_or_a_cache_would_let_them_see_each_other() -> None:
    # Why run_model passes neither: transformers then drops the documents' limits without a word.
    model = build("Llama", **MODELS["Llama"])
    ids = torch.randint(3, 59, (1, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        right = run_model(model, {"input_ids": ids, "position_ids": positions}, skip_head=False)[0]
        masked = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
        alone = model(ids[:, 5:], use_cache=False).logits
    scale = alone.abs().max()
    assert (right[:, 5:] - alone).abs().max() < 1e-5 * scale
    assert (masked[:, 5:] - alone).abs().max() > 1e-2 * scale


def test_a_model_that_lets_them_see_each_other_is_refused() -> None:
    model = build("Llama", **MODELS["Llama"])
    forward = model.forward
    model.forward = lambda position_ids=None, **rest: forward(**rest)
    with pytest.raises(UsageError, match="separate_documents"):
        check_isolation(model)
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(UsageError, match="takes no position_ids"):
        check_isolation(model)


@pytest.mark.parametrize("name", MODELS)
def test_skipping_the_head_gives_the_same_logits_or_is_not_done(name: str) -> None:
    model = build(name, "eager", **MODELS[name])
    ids = {"input_ids": torch.randint(3, 59, (2, 9))}
    assert can_skip_head(model) == (name != "Gemma2")  # soft-capped logits are no plain product
    if name == "Gemma2":
        return
    with torch.no_grad():
        hidden, head, layers = run_model(model, ids, skip_head=True, layers=True)
        expected = model(**ids).logits
    assert (head.logits(hidden) - expected).abs().max() < 1e-4
    assert len(layers) == 3
    assert model(**ids).logits.shape == expected.shape  # the head works again


def test_attention_projections_are_found_whatever_they_are_called() -> None:
    assert len(attention_linears(build("Llama", **MODELS["Llama"]))) == 8
    assert set(attention_linears(build("GPTNeoX", **MODELS["GPTNeoX"]))) == {
        f"gpt_neox.layers.{i}.attention.{n}" for i in (0, 1) for n in ("query_key_value", "dense")
    }
    with pytest.raises(UsageError, match="no linear layers"):
        attention_linears(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_dropout_is_set_everywhere() -> None:
    model = build("GPT2", **MODELS["GPT2"]).train()
    set_dropout(model, 0.0)
    ids = torch.randint(3, 59, (1, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("fast", [True, False])
def test_a_teacher_is_held_in_what_its_device_multiplies_fast(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.uptrain.model.has_bfloat16", lambda device: fast or device != "cpu")
    assert teacher_dtype("auto", "cpu") is (torch.bfloat16 if fast else torch.float32)
    assert teacher_dtype("auto", torch.device("cuda", 1)) is torch.bfloat16
    assert teacher_dtype("bfloat16", "cpu") is torch.bfloat16
    assert teacher_dtype("float32", "cuda") is torch.float32
