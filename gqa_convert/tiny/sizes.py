"""Which config fields are sizes, and what a tiny model puts there.

One vocabulary of field names serves every family of transformers: a field is a head count, a width, a layer count, ...
or it is a structural switch and is left alone. A field that no group below knows keeps its value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

VOCAB = 128  # ids below TEXT_IDS are plain text; special ids are moved to the top of the vocabulary
TEXT_IDS = 64
POSITIONS = 128
WINDOW = 8  # shorter than the proof's sequences, so that sliding layers really slide


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """The numbers of one tiny model; `side_*` would be the same for towers, whose KV heads are never reduced."""

    heads: int = 8
    kv_heads: int = 8
    layers: int = 2
    head_dim: int = 8

    @property
    def hidden(self) -> int:
        """Model width."""
        return self.heads * self.head_dim


HEADS = re.compile(
    r"(num_attention_heads|n_head|n_heads|num_heads|attention_heads|swa_num_attention_heads|conf_num_attention_heads"
    r"|num_sliding_attention_heads|cross_num_attention_heads|(de|en)coder_(num_)?attention_heads|resampler_n?_?heads"
    r"|num_(de|en)coder_attention_heads|(t2u|speech)_(de|en)coder_attention_heads|num_query_groups)"
)
KV_HEADS = re.compile(
    r"((cross_|swa_|num_global_|decoder_|encoder_)*num_key_value_heads|num_global_key_value_heads|num_kv_heads|kv_n_heads)"
)
HEAD_DIM = re.compile(
    r"((cross_|swa_|global_|attention_)?head_dim|d_kv|kv_channels|dim_head|attention_head_size|d_head)"
)
LAYERS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|layers|depth|(num_)?(de|en)coder_layers|conf_num_hidden_layers|num_blocks"
    r"|(de|en)coder_num_hidden_layers|(t2u|speech)_(de|en)coder_layers|resampler_depth|num_layers_per_stack"
    r"|num_global_layers)"
)
VOCABS = re.compile(r"(\w*vocab_size\w*|codebook_size|num_embeddings|num_embeds|num_centroids)")
POSITION_COUNTS = re.compile(
    r"(n_positions|max_position_embeddings|n_ctx|max_seq_len|max_(source|target|text|speech)_positions"
    r"|max_(de|en)coder_position_embeddings|context_length)"
)
WINDOWS = re.compile(r"(sliding_window|sliding_window_size|attention_window_size|attention_chunk_size|local_attention)")
INNER = re.compile(
    r"(\w*intermediate_size(_mlp)?|n_inner|d_ff|d_inner|dff|dim_ff|\w*ffn_dim|ffn_hidden_size|mlp_dim|feed_forward_size"
    r"|\w*expert_ffn_hidden_size|share_expert_dim|\w*ffn_intermediate_size|\w*linear_units)"
)
WIDTH = re.compile(
    r"(d_model|n_embd|embed_dim|hidden_dim|lru_width|mamba_d_ssm|dim|\w*hidden_size\w*|\w*(embed|emb)_dim|\w*embedding_(dim|size)"
    r"|\w*output_(dim|size)|\w*projection_dim|projector_(input|output)_dim|adapter_(in|out)_dim|\w*proj_dim|condition_dim"
    r"|adapter_input_size|input_size|image_token_embed_dim|\w*projection_hidden_dim|codebook_dim|\w*hidden_dimension"
    r"|conv_channels|decoder_dim|audio_prompt_dim|router_hidden_size|attention_hidden_size|upsample_groups)"
)
EXPERTS = re.compile(
    r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|zero_expert_num)"
)
TOP_K = re.compile(r"(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|top_k)")
TOKEN_ID = re.compile(
    r"(\w*token_id|\w*token_index|\w*token_ids|codec\w*_id|audio_stream_[be]os_id|\w*(image|im|slice)_\w+_id|newline_id|mask_index)"
)

# Upper bounds for sizes of no shared meaning: state-space widths, ranks, numbers of groups ...
CAPS: dict[str, int] = {
    "additional_vocab_size": 8,
    "ngram_vocab_size_base": 64,
    "encoder_hash_byte_group_vocab": 64,
    "mamba_n_heads": 16,
    "mamba_num_heads": 16,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "state_size": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_num_heads": 8,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    "laurel_rank": 8,
    "hc_lowrank": 8,
    "rel_extent": 32,
    "num_filters": 8,
    "upsample_initial_channel": 64,
    "base_channels": 32,
    "latent_channels": 32,
}


def positive_int(value: Any) -> bool:
    """Return True for an int that can be a size (bool excluded)."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def tiny_value(name: str, value: int, sizes: TinySizes) -> int:
    """Return what the field `name`, holding the positive int `value`, holds in a tiny model."""
    if name in CAPS:
        return min(value, CAPS[name])
    for pattern, tiny in (
        (HEADS, sizes.heads),
        (KV_HEADS, sizes.kv_heads),
        (HEAD_DIM, sizes.head_dim),
        (LAYERS, sizes.layers),
        (VOCABS, VOCAB),
        (INNER, 96),
        (WIDTH, sizes.hidden),
    ):
        if pattern.fullmatch(name):
            return tiny
    for pattern, cap in ((WINDOWS, WINDOW), (EXPERTS, 4), (TOP_K, 2)):
        if pattern.fullmatch(name):
            return min(value, cap)
    return value
