import pytest
import torch

from gqa_convert.errors import UsageError
from gqa_convert.uptrain.model import attention_linears, can_skip_head, check_isolation, run_model, set_dropout


def build(name, attention="sdpa", **more):
    import transformers

    config = getattr(transformers, f"{name}Config")(**more)
    cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    torch.manual_seed(0)
    return cls._from_config(config, attn_implementation=attention).eval()


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
MODELS = {
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
def test_documents_are_kept_apart_on_every_backend(name, attention):
    if name == "Gemma2" and attention != "eager":
        pytest.skip("Gemma 2 runs on eager attention only")
    assert check_isolation(build(name, attention, **MODELS[name])) < 1e-4


def test_a_mask_or_a_cache_would_let_them_see_each_other():
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


def test_a_model_that_lets_them_see_each_other_is_refused():
    model = build("Llama", **MODELS["Llama"])
    forward = model.forward
    model.forward = lambda position_ids=None, **rest: forward(**rest)
    with pytest.raises(UsageError, match="separate_documents"):
        check_isolation(model)
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(UsageError, match="takes no position_ids"):
        check_isolation(model)


@pytest.mark.parametrize("name", MODELS)
def test_skipping_the_head_gives_the_same_logits_or_is_not_done(name):
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


def test_attention_projections_are_found_whatever_they_are_called():
    assert len(attention_linears(build("Llama", **MODELS["Llama"]))) == 8
    assert set(attention_linears(build("GPTNeoX", **MODELS["GPTNeoX"]))) == {
        f"gpt_neox.layers.{i}.attention.{n}" for i in (0, 1) for n in ("query_key_value", "dense")
    }
    with pytest.raises(UsageError, match="no linear layers"):
        attention_linears(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_dropout_is_set_everywhere():
    model = build("GPT2", **MODELS["GPT2"]).train()
    set_dropout(model, 0.0)
    ids = torch.randint(3, 59, (1, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)
