"""What the general shrinking rule cannot know, by `model_type` of the config (root or nested), and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gqa_convert.modeling.shipping import ENCODERS
from gqa_convert.tiny.sizes import TinySizes

# Config classes whose defaults describe no whole model: what a real checkpoint would say. Used by `tiny_config` only,
# before shrinking. A dotted name reaches into a nested config that has no model type of its own.
DEFAULTS: dict[str, dict[str, Any]] = {
    # no attention layer by default
    **{name: {"is_decoder": True} for name in sorted(ENCODERS - {"xmod"})},  # encoders, but with this
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    # layer kinds have no default
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_experts_per_tok": 6},
    # required, but None by default
    "chameleon": {"vocabulary_map": {"<image>": 127}},
    "emu3": {"vocabulary_map": {"<image>": 127, "<|extra_200|>": 126}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 96},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 96},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 512},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
}

# Families whose vision tower needs a package that this proof does without: any other tower leaves the decoder as it is.
# model type -> (the replacing tower's config class, fields that the family's own code reads from a tower's config)
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast_vlm": ("siglip_vision_model", {}),
    "perception_lm": ("siglip_vision_model", {"model_args": {"embed_dim": 64}}),
}

# Applied after the general rule to any config.
SHRUNK: dict[str, dict[str, Any]] = {
    # placement of layers by arithmetic: a shallow model would lack a kind
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # the last layers read the keys and values of an earlier one of their kind
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        "intermediate_size": [96] * 4,
    },
    # the attention block is shared, which takes two layers that use it, and reads states beside embeddings
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": lambda sizes: 2 * sizes.hidden,
        "attention_head_dim": lambda sizes: 2 * sizes.head_dim,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": lambda sizes: 2 * sizes.hidden,
        "attention_head_dim": lambda sizes: 2 * sizes.head_dim,
        "n_mamba_heads": 8,
        "time_step_min": 1e-6,
        "mamba_headdim": lambda sizes: sizes.hidden // 4,
    },
    # part of a head, not of the default's
    "codegen": {"rotary_dim": lambda sizes: sizes.head_dim // 2},
    "gptj": {"rotary_dim": lambda sizes: sizes.head_dim // 2},
    # products that must come out right
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 16, "head_dim": 8},
    "fun_asr_nano": {"adaptor_config.intermediate_size": lambda sizes: sizes.hidden // 4},
    # the single step does not clamp its time step as prefill does: a bound that real time steps do not reach
    "nemotron_h": {"time_step_min": 1e-6},
    # the window bounds the cache but not the mask: it must not be reached
    "kyutai_speech_to_text": {"sliding_window": 64},
    "moshi": {"sliding_window": 64},
    # a few tokens or actions are as good as hundreds
    "diffusion_gemma": {"canvas_length": 8},
    "pi0": {"chunk_size": 4},
    # layer numbers that count from the vision tower's end or beyond two layers
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
}

# Sections of a rotary setting that the modelling code assumes when the config does not say.
MROPE_SECTIONS: dict[str, list[int]] = {
    "ernie4_5_vl_moe_text": [22, 22, 20],
    "glm4v_text": [8, 12, 12],
    "glm4v_moe_text": [8, 12, 12],
    "glm_ocr_text": [8, 12, 12],
    "hunyuan_vl_text": [16, 16, 16, 16],
    "paddleocr_vl_text": [16, 24, 24],
    "qwen2_5_omni_text": [16, 24, 24],
    "qwen2_5_omni_talker": [16, 24, 24],
    "qwen2_5_vl_text": [16, 24, 24],
    "qwen2_vl_text": [16, 24, 24],
}

# Switches that go with the number of KV heads where it is asked for.
SWITCHES: dict[str, dict[str, Callable[[TinySizes], Any]]] = {
    "falcon": {"multi_query": lambda sizes: sizes.kv_heads == 1},
    "gpt_bigcode": {"multi_query": lambda sizes: sizes.kv_heads == 1},
}

# (KV heads of the source, of the target) where the proof's usual 8 and 2 cannot be expressed.
KV_HEADS: dict[str, tuple[int, int]] = {
    "falcon": (8, 1),  # multi_query is a switch: all heads or one
    "gpt_bigcode": (8, 1),
    "mimo_v2_flash": (4, 2),  # sliding layers have twice as many
}

# Files beside the weights that a family's `from_pretrained` reads, with what they hold (saved by torch).
SIDE_FILES: dict[str, dict[str, Any]] = {
    "qwen2_5_omni": {"spk_dict.pt": {}},  # speakers' voices
}
