"""The few facts about single families that cannot be read off shapes; everything else is found, not listed.

Each entry was checked against the modelling code of transformers 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from gqa_convert.anatomy.head_axis import Layout
from gqa_convert.modeling import shipping

Path = tuple[str, ...]

# Where the decoder's configuration lies when `get_text_config(decoder=True)` does not lead there; several places where
# attention joins them or where both decode with a cache.
DECODER_PATHS: dict[str, tuple[Path, ...]] = {
    "blt": (("global_config",), ("decoder_config",)),
    "canary": (("decoder_config",),),
    "dia": (("decoder_config",),),
    "encoder-decoder": (("decoder",),),
    "pi0": (("vlm_config", "text_config"), ("dit_config",)),
    "qwen2_5_omni": (("thinker_config", "text_config"),),
    "qwen3_omni_moe": (("thinker_config", "text_config"),),
    "speech-encoder-decoder": (("decoder",),),
    "t5gemma": (("decoder",),),
    "t5gemma2": (("decoder",),),
    "vision-encoder-decoder": (("decoder",),),
}

# Other spellings of a KV field that a config.json may use; the class renames them while reading.
JSON_ALIASES = ("n_head_kv", "num_attention_groups", "multi_query_group_num", "n_kv_heads")

# Fused projections: how q, k and v lie in the rows of the source and of the target.
#   concat    all q heads, then all k heads, then all v heads
#   per_head  [q k v] for each head in turn (MHA only)
FUSED_LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "phi3": ("concat", "concat"),
    "phi4_multimodal": ("concat", "concat"),
    "dbrx": ("concat", "concat"),
    "gpt_bigcode": ("per_head", "concat"),
    "gpt2": ("concat", "concat"),
    "persimmon": ("per_head", "concat"),
    "gpt-sw3": ("concat", "concat"),
    "falcon": ("per_head", "concat"),
    "bloom": ("per_head", "concat"),
    "gpt_neox_japanese": ("per_head", "concat"),
    "mpt": ("concat", "concat"),
}


def fused_layouts(model_type: str, query_heads: int, kv_heads: int) -> tuple[Layout, Layout] | None:
    """Return how q, k and v lie in fused rows of the source and of the target; None if that is not known.

    The shipped modelling file has them one after the other wherever there are fewer KV heads than query heads.
    """
    layouts = FUSED_LAYOUTS.get(model_type.removeprefix(shipping.TYPE_PREFIX))
    if layouts is None or not shipping.is_shipped(model_type) or query_heads == kv_heads:
        return layouts
    return layouts[1], layouts[1]


# transformers stores one KV head for these or as many as there are query heads, nothing between.
ONLY_MQA = {
    "gpt_bigcode": "GPTBigCode has multi-query attention or none: only --groups 1 can be expressed",
    "falcon": (
        "Falcon's grouped attention broadcasts K and V to every query head before caching them, so between 1 and all "
        "heads it saves no cache: only --groups 1 (multi_query) is worth having"
    ),
}

# diffllama splits V in two halves by head; an odd count cannot be halved.
ONLY_EVEN = {"diffllama": "DiffLlama reads its KV heads in pairs"}


def effective_kv_heads(owner: Any, name: str, value: Any) -> Any:
    """Return the KV heads really used where another switch overrides the field."""
    model_type = getattr(owner, "model_type", "")
    if model_type == "falcon" and owner.multi_query and not owner.new_decoder_architecture:
        return 1
    if model_type == "gpt_bigcode":
        return 1 if owner.multi_query else owner.num_attention_heads
    return value


def extra_edits(config: Any, values: Mapping[str, Any], groups: int) -> dict[Path, Any]:
    """Return the JSON edits that must accompany the KV field, for families that keep a derived copy or a switch.

    `values` is config.json as parsed.
    """
    model_type = getattr(config, "model_type", "")
    if model_type == "dbrx" and "num_key_value_heads" in values:
        return {("num_key_value_heads",): groups}
    if model_type in ("gpt_bigcode", "falcon") and groups == 1:
        return {("multi_query",): True}
    return {}


def refusal(config: Any, groups: int, kv_heads: int) -> str | None:
    """Return why this family cannot have `groups` KV heads although a field for them exists; None if it can."""
    model_type = getattr(config, "model_type", "")
    if groups == kv_heads:
        return None
    if model_type == "falcon" and config.new_decoder_architecture:
        return f"{ONLY_MQA['falcon']}, and this block (new_decoder_architecture) has no such form."
    if model_type in ONLY_MQA and groups != 1:
        return f"{ONLY_MQA[model_type]}."
    if model_type in ONLY_EVEN and groups % 2:
        return f"{ONLY_EVEN[model_type]}: choose an even number of groups."
    return None


@cache
def refused_families() -> dict[str, tuple[str, str]]:
    """Return model type -> (class, reason) for families known not to convert (classes C, D and N)."""
    text = files("gqa_convert.anatomy").joinpath("refused.json").read_text(encoding="utf-8")
    return {name: (entry["class"], entry["reason"]) for name, entry in json.loads(text)["families"].items()}
