"""Tiny configs of any architecture: every structural switch kept, every size small.

`shrink` makes one from a given config (a user's own), `tiny_config` from the defaults of a model type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from typing import Any

from gqa_convert.modeling import shipping, uneven
from gqa_convert.tiny.layers import choose_layers, cut_layers
from gqa_convert.tiny.overrides import DEFAULTS, MROPE_SECTIONS, SHRUNK, SWITCHES, TOWERS
from gqa_convert.tiny.rotary import rope_dicts, shrink_rope, smallest_head_dim
from gqa_convert.tiny.sizes import (
    HEADS,
    KV_HEADS,
    POSITION_COUNTS,
    POSITIONS,
    TOKEN_ID,
    VOCAB,
    TinySizes,
    positive_int,
    tiny_value,
)

# Parts beside the decoder that is converted: their KV heads are never reduced.
SIDE = re.compile(
    r"\w*(vision|audio|image|codec|vq|qformer|perceiver|adapt[eo]r|speech|token2wav|code2wav|flow|diffusion|head_config"
    r"|projector|tower|semantic|acoustic|encoder_config|depth_decoder|talker|patcher|timestamp)\w*|encoder"
)
# Describe where the config came from, not the model.
DROPPED = ("quantization_config", "auto_map", "transformers_weights", "_name_or_path", "transformers_version")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth", "decoder_layers")


def tiny_config(
    model_type: str,
    *,
    num_heads: int = 8,
    num_kv_heads: int = 8,
    num_layers: int = 2,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """Return a tiny `PreTrainedConfig` of `model_type`, shrunk from the defaults of its config class.

    Layers are `num_layers`, or as many as it takes to have one of every kind. Only the decoder gets `num_kv_heads`;
    towers and encoders have as many as query heads. `changes` are set on every config of the tree that has the field,
    to reach variants that are not the default (`{"use_qk_norm": True}`).
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    if model_type in TOWERS:
        tower, fields = TOWERS[model_type]
        config.vision_config = CONFIG_MAPPING[tower](**fields)
    for part in config_tree(config):
        for path, value in DEFAULTS.get(part.model_type, {}).items():
            *owners, name = path.split(".")
            setattr(reduce(getattr, owners, part), name, deepcopy(value))
        for name, value in (changes or {}).items():
            if name in vars(part):
                setattr(part, name, deepcopy(value))
    small = shrink(config, num_heads=num_heads, num_kv_heads=num_kv_heads, num_layers=num_layers)
    if shipping.ships(model_type) and num_kv_heads < num_heads:
        return shipping.grouped_config(small, num_kv_heads)
    return small


def shrink(config: Any, *, num_heads: int | None = None, num_kv_heads: int | None = None, num_layers: int = 2) -> Any:
    """Return a tiny config of the same architecture as `config`, which is left as it was.

    Kept: norms, biases, activations, tying, rotary kind, layer kinds, expert routing. Made small: heads, widths,
    layers, vocabulary, experts. Without `num_heads` and `num_kv_heads` the ratio of query to KV heads is kept.
    """
    config = _evened(config)
    heads, kv_heads = head_counts(config.to_dict(), num_heads, num_kv_heads)
    head_dim = max(smallest_head_dim(_fields_of(part)) for part in config_tree(config))
    sizes = TinySizes(heads=heads, kv_heads=kv_heads, layers=num_layers, head_dim=head_dim)
    fields = _Shrinker(keep_ratio=num_kv_heads is None).fields(config, sizes, side=False)
    fields["dtype"] = "float32"
    return type(config)(**fields)


def _evened(config: Any) -> Any:
    """A configuration whose layers differ in KV heads, with those of the layer that has most in all of them."""
    if uneven.is_uneven(config):
        even = deepcopy(config)
        even.num_key_value_heads, even.block_configs = max(config.kv_heads), None
        return even
    if not shipping.is_shipped(str(config.model_type)):
        return config
    even = config
    for name in shipping.field_names():
        counts = getattr(config, name, None)
        if isinstance(counts, (list, tuple)):
            even = deepcopy(config) if even is config else even
            setattr(even, name, max(counts))
    return even


def config_tree(config: Any) -> list[Any]:
    """Return `config` and all configs nested in it."""
    from transformers import PreTrainedConfig

    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(inner for value in nested for inner in config_tree(value))]


def head_counts(fields: dict[str, Any], heads: int | None, kv_heads: int | None) -> tuple[int, int]:
    """Return tiny query and KV head counts, in the ratio of the first decoder found where not given."""
    query, kv = _find_heads(fields) or (1, 1)
    ratio = max(1, query // kv)
    if kv_heads is None and heads is None:
        kv_heads = 1 if kv == 1 < query else max(2, 8 // ratio)
    elif kv_heads is None:
        kv_heads = max(1, (heads or 1) // ratio)
    return heads or kv_heads * min(ratio, 8), kv_heads


def _find_heads(fields: dict[str, Any]) -> tuple[int, int] | None:
    """Return (query heads, KV heads) of a config or of the first decoder nested in it."""
    heads = [value for name, value in fields.items() if HEADS.fullmatch(name) and positive_int(value)]
    kv = [value for name, value in fields.items() if KV_HEADS.fullmatch(name) and positive_int(value)]
    if heads:
        return heads[0], kv[0] if kv else heads[0]
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value and not SIDE.fullmatch(name):
            nested = _find_heads(value)
            if nested:
                return nested
    return None


def _fields_of(config: Any) -> dict[str, Any]:
    """Return a config's own fields, rotary sections that its code would assume filled in."""
    fields = {name: value for name, value in config.to_dict().items() if name not in DROPPED}
    section = MROPE_SECTIONS.get(config.model_type)
    if section is not None:
        for params in rope_dicts(fields):
            params.setdefault("mrope_section", section)
    return fields


class _Shrinker:
    """Turns one config, and those nested in it, into constructor arguments of their tiny versions."""

    def __init__(self, *, keep_ratio: bool) -> None:
        self.keep_ratio = keep_ratio
        self.ids: dict[int, int] = {}  # special ids of the whole tree: equal ids stay equal, different ones different

    def fields(self, config: Any, sizes: TinySizes, *, side: bool) -> dict[str, Any]:
        """Return the constructor arguments of the tiny version of `config`."""
        from transformers import PreTrainedConfig

        fields = _fields_of(config)
        sizes = self._own_sizes(fields, sizes, side)
        small: dict[str, Any] = {}
        for name, value in fields.items():
            nested = vars(config).get(name)
            if isinstance(nested, PreTrainedConfig):
                small[name] = self.fields(nested, sizes, side=side or bool(SIDE.fullmatch(name)))
            elif name == "per_layer_config" and isinstance(value, dict):
                small[name] = {layer: self._layer(entry, fields, sizes) for layer, entry in value.items()}
            elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
                small[name] = shrink_rope(value, fields, sizes.head_dim)
            else:
                small[name] = self._value(name, value, sizes)
        _fit_positions(small, fields)
        switches = {} if self.keep_ratio else SWITCHES.get(config.model_type, {})
        small.update({name: switch(sizes) for name, switch in switches.items()})
        for path, value in SHRUNK.get(config.model_type, {}).items():
            *owners, name = path.split(".")
            owner = small
            for each in owners:
                owner = owner[each]
            owner[name] = value(sizes) if callable(value) else deepcopy(value)
        return small

    def _own_sizes(self, fields: dict[str, Any], sizes: TinySizes, side: bool) -> TinySizes:
        """Return the sizes of one config of the tree, and cut its per-layer lists (in place)."""
        own = _find_heads({name: value for name, value in fields.items() if not isinstance(value, dict)})
        if side and (own is None or not self.keep_ratio):
            sizes = replace(sizes, kv_heads=sizes.heads)
        elif self.keep_ratio and own is not None:
            wanted = max(1, sizes.heads * own[1] // own[0])
            sizes = replace(sizes, kv_heads=max(d for d in range(1, wanted + 1) if sizes.heads % d == 0))
        depth = next((fields[name] for name in DEPTHS if positive_int(fields.get(name))), None)
        if depth is None and isinstance(fields.get("layers_block_type"), list):  # Nemotron-H counts its layers by it
            depth = len(fields["layers_block_type"])
        if depth is not None:
            chosen = choose_layers(fields, depth, min(depth, sizes.layers))
            fields.update(cut_layers(fields, depth, chosen))
            sizes = replace(sizes, layers=len(chosen))
        return sizes

    def _layer(self, entry: dict[str, Any], fields: dict[str, Any], sizes: TinySizes) -> dict[str, Any]:
        """Return one layer's own settings; a head_dim unlike the other layers' stays unlike them."""
        small = {name: self._value(name, value, sizes) for name, value in entry.items()}
        if small.get("head_dim") and entry["head_dim"] != fields.get("head_dim"):
            small["head_dim"] *= 2
        return small

    def _value(self, name: str, value: Any, sizes: TinySizes) -> Any:
        if TOKEN_ID.fullmatch(name):
            return [self._id(token) for token in value] if isinstance(value, list) else self._id(value)
        if positive_int(value):
            return tiny_value(name, value, sizes)
        if isinstance(value, list) and value and all(positive_int(entry) for entry in value):
            return [tiny_value(name.removesuffix("_per_layer"), entry, sizes) for entry in value]
        return value

    def _id(self, token: Any) -> Any:
        """Keep the lowest ids and move the others to the top of the vocabulary."""
        if not positive_int(token) or token < 4:
            return token
        return self.ids.setdefault(token, VOCAB - 1 - len(self.ids) % (VOCAB // 2))


def _fit_positions(small: dict[str, Any], fields: dict[str, Any]) -> None:
    """Shorten position tables. Rotary positions have no table and may scale with the length, which is kept for them."""
    if any(True for _ in rope_dicts(fields)):
        return
    for name, value in fields.items():
        if POSITION_COUNTS.fullmatch(name) and positive_int(value):
            small[name] = min(value, POSITIONS)
