"""Where a model's configuration says how many KV heads its decoder has.

Values are read through the configuration class, never from raw JSON: 141 of 205 KV fields in transformers 5.23 default
to an integer that is not the head count, so an absent key does not mean MHA. Edits are made to the JSON, in the
spelling that is there, and read back through the class to see that they arrived.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from gqa_convert.anatomy import family_facts
from gqa_convert.errors import CheckpointError, UnsupportedModelError, UsageError
from gqa_convert.heads import Groups, HeadPlan, divisors, groups_at
from gqa_convert.hf.api import config_from_dict

Path = tuple[str, ...]

_KV_NAME = re.compile(r"^(swa_|cross_|num_global_)?(num_key_value_heads|num_kv_heads|kv_n_heads|key_value_heads)$")
_NESTED: tuple[Path, ...] = (("text_config",), ("llm_config",), ("language_config",))
"""Where engines other than transformers may look for the decoder's configuration."""
_HEAD_NAMES = ("num_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass(frozen=True, kw_only=True)
class KVField:
    """One configuration field that sets a number of KV heads.

    `path` leads through the configuration's attributes; `kv_heads` is its present value, `query_heads` the number of
    query heads of the same (sub-)configuration. `target` is the value it is to get, where that is not the one that
    all fields get. `layers` are the KV heads of each decoder layer where they differ already; `kv_heads` are then those
    of the layer that has most.
    """

    path: Path
    kv_heads: int
    query_heads: int
    target: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The path, dotted, as a user would write it."""
        return ".".join(self.path)

    @property
    def cross(self) -> bool:
        """True if it counts the KV heads of cross-attention only."""
        return self.path[-1].startswith("cross_")

    def at(self, layer: int) -> int:
        """KV heads of one decoder layer now."""
        return self.layers[layer] if self.layers else self.kv_heads

    def wanted(self, groups: int) -> int:
        """The KV heads of this field in a conversion of all layers to `groups`; never more than it has."""
        return min(self.kv_heads, self.target or groups)

    def wanted_at(self, groups: Groups, layer: int) -> int:
        """The KV heads of one layer in a conversion to `groups`; never more than it has."""
        return min(self.at(layer), self.target or groups_at(groups, layer))

    def changes(self, groups: Groups) -> bool:
        """True if a conversion to `groups` leaves any layer fewer KV heads."""
        if isinstance(groups, int) and not self.layers:
            return self.kv_heads > self.wanted(groups)
        layers = len(self.layers or groups.counts) if isinstance(groups, HeadPlan) else len(self.layers)
        return any(self.at(layer) > self.wanted_at(groups, layer) for layer in range(layers))

    def after(self, groups: Groups, layers: int) -> int | tuple[int, ...]:
        """The KV heads that a conversion to `groups` leaves: of every one of `layers` layers alike, or of each."""
        counts = tuple(self.wanted_at(groups, layer) for layer in range(layers))
        return counts[0] if len(set(counts)) == 1 else counts


def get_path(config: Any, path: Path) -> Any:
    """Follow attribute (or key, or per-layer entry) names into a configuration; None where one is missing."""
    for name in path:
        if isinstance(config, Mapping):
            config = config.get(name, config.get(int(name)) if name.isdigit() else None)
        else:
            config = getattr(config, name, None)
    return config


def find_kv_fields(config: Any, values: Mapping[str, Any]) -> tuple[KVField, ...]:
    """Return the KV-head fields of the decoder, the main one first; empty if it has none.

    Vision towers, audio encoders, perceivers, adapters and codecs keep fields of the same name: only the decoder's own
    part of the configuration is searched. `values` is config.json as parsed.
    """
    for prefixes in decoder_paths(config):
        fields = tuple(field for prefix in prefixes for field in _fields_at(config, prefix, values))
        if fields:
            return fields
    _check_stated(values)
    return ()


def _check_stated(values: Mapping[str, Any]) -> None:
    """Tell a configuration that states no KV heads to speak of from one whose family has no such setting."""
    for prefix, section in (("", values), ("text_config.", values.get("text_config"))):
        for name, value in section.items() if isinstance(section, Mapping) else ():
            if _KV_NAME.match(name) and isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise CheckpointError(f"config.json: {prefix}{name} is {value}; attention needs at least one KV head.")


def decoder_paths(config: Any) -> Iterator[tuple[Path, ...]]:
    """Yield where the decoder's configuration may lie, the likeliest first; several paths change together."""
    model_type = getattr(config, "model_type", "")
    if model_type in family_facts.DECODER_PATHS:
        yield family_facts.DECODER_PATHS[model_type]
        return
    try:
        text = config.get_text_config(decoder=True)
    except (AttributeError, ValueError, TypeError):
        text = config
    if text is not config:
        for name in ("text_config", "decoder", "generator"):
            if getattr(config, name, None) is text:
                yield ((name,),)
    yield ((),)


def _fields_at(config: Any, prefix: Path, values: Mapping[str, Any]) -> Iterator[KVField]:
    owner = get_path(config, prefix) if prefix else config
    if owner is None:
        return
    # Where attention has a configuration of its own, a field beside it is a copy that no layer reads (DBRX).
    paths: list[Path] = [("attn_config", name) for name in _kv_names(getattr(owner, "attn_config", None))]
    paths = paths or [(name,) for name in _kv_names(owner)]
    raw = _json_at(values, prefix)
    paths += [(name,) for name in raw if name.startswith("num_global_") and _KV_NAME.match(name)]
    paths += _per_layer_paths(raw)
    paths.sort(key=lambda path: (len(path), path[-1] not in ("num_key_value_heads", "num_kv_heads", "kv_n_heads")))
    for path in dict.fromkeys(paths):
        value = get_path(owner, path)
        value = get_path(raw, path) if value is None else value
        value = family_facts.effective_kv_heads(owner, path[-1], value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield KVField(path=prefix + path, kv_heads=value, query_heads=_query_heads(owner, path[-1], value))


def _kv_names(owner: Any) -> list[str]:
    if owner is None:
        return []
    if isinstance(owner, Mapping):
        return sorted(name for name in owner if _KV_NAME.match(name))
    declared = set(getattr(type(owner), "__dataclass_fields__", {})) | set(vars(owner))
    aliases = set(getattr(owner, "attribute_map", None) or {})
    return sorted(name for name in declared - aliases if _KV_NAME.match(name))


def _per_layer_paths(raw: Mapping[str, Any]) -> list[Path]:
    layers = raw.get("per_layer_config")
    if not isinstance(layers, Mapping):
        return []
    return [
        ("per_layer_config", index, name)
        for index, entry in layers.items()
        if isinstance(entry, Mapping)
        for name in entry
        if _KV_NAME.match(name)
    ]


def _json_at(values: Mapping[str, Any], prefix: Path) -> Mapping[str, Any]:
    section = get_path(values, prefix) if prefix else values
    return section if isinstance(section, Mapping) else {}


def _query_heads(owner: Any, name: str, kv_heads: int) -> int:
    prefix = next((p for p in ("swa_", "cross_") if name.startswith(p)), "")
    for head_name in _HEAD_NAMES:
        value = getattr(owner, prefix + head_name, None)
        if isinstance(value, int) and value >= kv_heads:
            return value
    return kv_heads


def check_groups(fields: tuple[KVField, ...], groups: int, stated: str = "") -> tuple[KVField, ...]:
    """Return the fields that `groups` changes; fields that are already as small stay as they are.

    `stated` says where the source's configuration has its number of heads; by default, in the main field.

    Raises:
        UsageError: if `groups` does not divide a field's KV heads.
    """
    main = fields[0]
    free = [f for f in fields if f.target is None]
    counts = {count for f in free for count in (f.layers or (f.kv_heads,))}
    legal = [d for d in divisors(main.kv_heads) if all(d >= count or count % d == 0 for count in counts)]
    if groups not in legal:
        what = "query heads cannot be shared by" if main.kv_heads == main.query_heads else "KV heads cannot become"
        more = "" if groups <= main.kv_heads else " Groups are KV heads: converting only ever lowers their number."
        raise UsageError(
            f"--groups {groups}: {main.kv_heads} {what} {groups} KV heads "
            f"({stated or f'config.json: {main.name}={main.kv_heads}'}). "
            f"Choose one of {', '.join(map(str, legal))}.{more}"
        )
    return tuple(field for field in fields if field.changes(groups))


def check_plan(fields: tuple[KVField, ...], plan: HeadPlan, layers: int) -> tuple[KVField, ...]:
    """Return the fields that a plan for each of `layers` decoder layers changes.

    Raises:
        UsageError: if it is of another number of layers, or a layer's heads cannot share so many KV heads.
    """
    if len(plan.counts) != layers:
        raise UsageError(
            f"--groups-per-layer: KV heads of {len(plan.counts)} layers, but the decoder has {layers}. Give one number "
            "for each layer, first to last."
        )
    main, free = fields[0], [f for f in fields if f.target is None]
    for layer, count in enumerate(plan.counts):
        have = main.at(layer)
        legal = [d for d in divisors(have) if all(d >= f.at(layer) or f.at(layer) % d == 0 for f in free)]
        if count not in legal:
            more = " Converting only ever lowers their number." if count > have else ""
            raise UsageError(
                f"--groups-per-layer: layer {layer} has {have} KV heads, which cannot become {count}. Choose one of "
                f"{', '.join(map(str, legal))}.{more}"
            )
    return tuple(field for field in fields if field.changes(plan))


def aim(fields: tuple[KVField, ...], cross_groups: int | None) -> tuple[KVField, ...]:
    """Set the fields of cross-attention to `cross_groups`, if it is given.

    Raises:
        UsageError: if there is no such field, or `cross_groups` does not divide its KV heads.
    """
    if cross_groups is None:
        return fields
    legal = [d for field in fields if field.cross for d in divisors(field.kv_heads)]
    if not legal:
        raise UsageError(
            f"--cross-groups {cross_groups}: this model has no setting for the KV heads of its cross-attention alone."
        )
    if cross_groups not in legal:
        raise UsageError(
            f"--cross-groups {cross_groups}: {max(legal)} heads of cross-attention cannot be shared by {cross_groups} "
            f"KV heads. Choose one of {', '.join(map(str, legal))}."
        )
    return tuple(replace(field, target=cross_groups) if field.cross else field for field in fields)


def config_edits(
    config: Any, values: Mapping[str, Any], fields: tuple[KVField, ...], groups: int
) -> tuple[dict[Path, Any], Any]:
    """Work out the JSON edits that give the fields `groups` KV heads, and the configuration they produce.

    Returns:
        The edits (JSON path -> value) and the edited configuration, as its class reads it.

    Raises:
        UnsupportedModelError: if the class does not take the value, wherever in the JSON it is written.
    """
    edits: dict[Path, Any] = {}
    for field in fields:
        edits.update(_edit_one(config, values, edits, field, groups))
    for field in fields:
        edits.update(_copies(config, values, edits, field, groups))
    edits.update(family_facts.extra_edits(config, values, groups))
    edited = config_from_dict(config, apply_edits(values, edits))
    return edits, edited


def _edit_one(
    config: Any, values: Mapping[str, Any], done: Mapping[Path, Any], field: KVField, groups: int
) -> dict[Path, Any]:
    for path in _json_candidates(values, field):
        wanted = field.wanted(groups)
        trial = {**done, path: wanted}
        try:
            edited = config_from_dict(
                config, apply_edits(values, trial | family_facts.extra_edits(config, values, groups))
            )
        except Exception:  # a strict class refuses a key in the wrong place: try the next one
            continue
        read = get_path(edited, field.path)
        if read == wanted or (read is None and field.path[-1].startswith("num_global_")):
            return {path: wanted}
    raise UnsupportedModelError(
        f"{type(config).__name__}: transformers does not read {field.name}={groups} from config.json."
    )


def _copies(
    config: Any, values: Mapping[str, Any], done: Mapping[Path, Any], field: KVField, groups: int
) -> dict[Path, Any]:
    """Edits of the other places that state a field's KV heads (flat beside `text_config`): other engines read those.

    Only what says the same number now is such a copy, and only where transformers still reads what it should.
    """
    leaf, wanted = field.path[-1], field.wanted(groups)
    plain = not leaf.startswith(("swa_", "cross_", "num_global_"))
    edits: dict[Path, Any] = {}
    for prefix in dict.fromkeys((field.path[:-1], (), *_NESTED)):
        section = _json_at(values, prefix)
        for name in (leaf, *(family_facts.JSON_ALIASES if plain else ())):
            path = (*prefix, name)
            if path in done or section.get(name) != field.kv_heads or isinstance(section.get(name), bool):
                continue
            trial = {**done, **edits, path: wanted}
            try:
                edited = config_from_dict(config, apply_edits(values, trial))
            except Exception:  # a strict class: leave alone what it does not take
                continue
            if get_path(edited, field.path) in (wanted, None):
                edits[path] = wanted
    return edits


def _json_candidates(values: Mapping[str, Any], field: KVField) -> Iterator[Path]:
    *parents, leaf = field.path
    prefix = tuple(parents)
    if leaf in _json_at(values, prefix):
        yield field.path
    if leaf in values:
        yield (leaf,)
    for name in _json_at(values, prefix):
        if name in family_facts.JSON_ALIASES:
            yield (*prefix, name)
    if not prefix or get_path(values, prefix) is not None:
        yield field.path
    yield (leaf,)


def apply_edits(values: Mapping[str, Any], edits: Mapping[Path, Any]) -> dict[str, Any]:
    """Return a deep copy of parsed JSON with the edits made."""
    edited: dict[str, Any] = deepcopy(dict(values))
    for path, value in edits.items():
        place = edited
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
    return edited
