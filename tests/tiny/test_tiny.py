"""Tiny configs: small in size, the same in kind."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gqa_convert.tiny.layers import choose_layers, cut_layers
from gqa_convert.tiny.mappings import survey_model_types
from gqa_convert.tiny.model import model_class, tiny_model
from gqa_convert.tiny.rotary import share, smallest_head_dim
from gqa_convert.tiny.shrink import shrink, tiny_config


def big_llama(**changes: Any) -> LlamaConfig:
    fields = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "eos_token_id": [128001, 128009],
        "max_position_embeddings": 131072,
    }
    return LlamaConfig(**{**fields, **changes})


def test_shrink_keeps_every_switch() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = big_llama(attention_bias=True, tie_word_embeddings=True, hidden_act="gelu", rope_parameters=dict(rope))
    small = shrink(config)
    assert (small.attention_bias, small.tie_word_embeddings, small.hidden_act) == (True, True, "gelu")
    assert small.rope_parameters == rope
    assert small.num_attention_heads == 4 * small.num_key_value_heads
    assert small.hidden_size <= 128
    assert small.num_hidden_layers == 2
    assert config.hidden_size == 4096, "the given config must not change"


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (14, 2), (71, 1), (12, 12), (48, 8), (64, 1)])
def test_shrink_keeps_the_kind_of_attention(heads: int, kv_heads: int) -> None:
    small = shrink(big_llama(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=heads * 64))
    assert (small.num_key_value_heads == small.num_attention_heads) == (heads == kv_heads)
    assert (small.num_key_value_heads == 1) == (kv_heads == 1)
    assert small.num_attention_heads % small.num_key_value_heads == 0


def test_special_ids_stay_apart_and_inside_the_vocabulary() -> None:
    small = shrink(CONFIG_MAPPING["qwen2_vl"]())
    ids = [value for name, value in vars(small).items() if name.endswith("_token_id") and isinstance(value, int)]
    special = [token for token in ids if token >= 4]
    assert len(set(special)) == len(special) > 2
    assert max(ids) < small.text_config.vocab_size


def test_explicit_heads_are_obeyed_by_the_decoder_only() -> None:
    config = tiny_config("exaone4_5", num_kv_heads=2)
    assert config.text_config.num_key_value_heads == 2
    assert config.vision_config.num_key_value_heads == 8


def test_a_hybrid_keeps_a_layer_of_every_kind() -> None:
    assert set(tiny_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}
    assert set(tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}


def test_layer_lists_and_layer_numbers_are_cut_alike() -> None:
    fields = {"layer_types": ["a", "a", "b", "a", "a", "b"], "cross_attention_layers": [1, 4], "other": [1, 2]}
    chosen = choose_layers(fields, 6, at_least=2)
    assert chosen == [0, 1, 2]
    assert cut_layers(fields, 6, chosen) == {"layer_types": ["a", "a", "b"], "cross_attention_layers": [1]}


def test_head_dim_grows_until_the_rotation_fits() -> None:
    assert smallest_head_dim({}) == 8
    assert smallest_head_dim({"rope_parameters": {"partial_rotary_factor": 0.4}}) == 16
    assert smallest_head_dim({"rope_parameters": {"mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}}) == 32


@pytest.mark.parametrize(("total", "parts"), [(4, [16, 24, 24]), (4, [11, 11, 10]), (8, [16, 16, 16, 16])])
def test_share_splits_without_rest(total: int, parts: list[int]) -> None:
    shares = share(total, parts)
    assert sum(shares) == total
    assert min(shares) >= 1


def test_changes_reach_variants() -> None:
    assert tiny_config("cohere", changes={"use_qk_norm": True}).use_qk_norm
    assert tiny_config("stablelm", changes={"qk_layernorm": True}).qk_layernorm


def test_the_survey_has_the_known_families() -> None:
    types = survey_model_types()
    assert {"llama", "t5", "qwen2_vl", "whisper", "dia", "phi3"} <= set(types)


def test_the_class_is_the_architectures_or_the_fullest() -> None:
    config = shrink(Qwen2Config())
    assert model_class(config).__name__ == "Qwen2ForCausalLM"
    assert model_class(config, ["Qwen2ForSequenceClassification"]).__name__ == "Qwen2ForSequenceClassification"
    assert model_class(CONFIG_MAPPING["llama4"]()).__name__ == "Llama4ForConditionalGeneration"


def test_weights_are_seeded_and_nowhere_special() -> None:
    config = tiny_config("qwen2")
    first, again, other = (tiny_model(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(first[name].equal(again[name]) for name in first)
    assert not any(first[name].equal(other[name]) for name in first)
    assert first["model.norm.weight"].std() > 0.1
    assert first["model.layers.0.self_attn.k_proj.bias"].std() > 0.1
