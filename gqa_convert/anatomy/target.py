"""The KV fields of any model, and the configuration and class that it has with other values of them.

Families without a setting of their own (`gqa_convert.modeling`) get both from the GQA form of their class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.kv_fields import KVField, apply_edits, config_edits, find_kv_fields, get_path
from gqa_convert.anatomy.kv_fields import Path as JSONPath
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.heads import Groups, HeadPlan
from gqa_convert.hf import api
from gqa_convert.modeling import shipping, uneven


def fields_of(config: Any, values: Mapping[str, Any], model: Callable[[], Any]) -> tuple[KVField, ...]:
    """Return a model's KV fields, the main one first; empty if it has none and cannot be given any.

    `model` gives the model itself, with or without memory; it is called for families without a setting of their own.

    Raises:
        UnsupportedModelError: if this model of a family that could be given some keeps no KV cache.
    """
    model_type = str(config.model_type)
    if shipping.ships(model_type) or shipping.is_shipped(model_type):
        return _shipped_fields(config, model)
    if uneven.is_uneven(config):
        layers, heads = tuple(config.kv_heads), config.num_attention_heads
        return (_field((uneven.FIELD,), layers, heads),)
    return find_kv_fields(config, values)


def _field(path: JSONPath, layers: tuple[int, ...], query_heads: int) -> KVField:
    """The field of which each layer has its own value."""
    differ = len(set(layers)) > 1
    return KVField(path=path, kv_heads=max(layers), query_heads=query_heads, layers=layers if differ else ())


def decoder_layers(config: Any, model: Callable[[], Any]) -> int:
    """Return the number of decoder layers; `model` as in `fields_of`.

    Raises:
        UnsupportedModelError: if the configuration does not say.
    """
    model_type = str(config.model_type)
    if shipping.ships(model_type) or shipping.is_shipped(model_type):
        return shipping.decoder_layers(model())
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise UnsupportedModelError(f"{model_type}: its configuration does not say how many decoder layers it has.")
    return layers


def stated_counts(config: Any, values: Mapping[str, Any], field: KVField) -> int | tuple[int, ...] | None:
    """Return what a configuration, or else config.json, says for a field: of all layers alike, or of each."""
    if uneven.is_uneven(config):
        counts = tuple(config.kv_heads)
        return counts if len(set(counts)) > 1 else counts[0]
    found = get_path(config, field.path)
    found = get_path(values, field.path) if found is None else found
    return tuple(found) if isinstance(found, list) else found


def retarget(
    config: Any,
    values: Mapping[str, Any],
    model_class: type,
    fields: tuple[KVField, ...],
    groups: Groups,
    folder: Path | None = None,
    layers: int = 1,
) -> tuple[dict[JSONPath, Any], Any, type]:
    """Work out the model with `groups` KV heads: the JSON edits, the configuration they produce, and its class.

    Args:
        config: the source's configuration.
        values: its config.json as parsed.
        model_class: the source's class.
        fields: all its KV fields; those that have more KV heads than they are to have are changed.
        groups: KV heads after the conversion, of every layer alike or of each.
        folder: the source's folder, whose tokenizer may need naming.
        layers: how many decoder layers there are, where `groups` or the source has a number for each.

    Raises:
        UnsupportedModelError: if no configuration can say so.
    """
    changed = tuple(field for field in fields if field.changes(groups))
    if not changed:
        return {}, config, model_class
    if shipping.ships(str(config.model_type)):
        return _shipped_target(config, values, model_class, fields, groups, folder, layers)
    if uneven.is_uneven(config):
        return _uneven_target(config, values, changed[0], groups, config.num_hidden_layers)
    differ = isinstance(groups, HeadPlan) or any(field.layers for field in changed)
    if differ and shipping.is_shipped(str(config.model_type)):
        edits: dict[JSONPath, Any] = {field.path: _as_json(field.after(groups, layers)) for field in changed}
        return edits, api.config_from_dict(config, apply_edits(values, edits)), model_class
    if isinstance(groups, HeadPlan):
        why = uneven.refusal(config, model_class.__name__)
        if why or len(fields) > 1:
            raise UnsupportedModelError(
                f"{config.model_type} cannot have another number of KV heads in each layer: "
                f"{why or 'it has several settings for KV heads'}."
            )
        return _uneven_target(config, values, changed[0], groups, layers)
    return *config_edits(config, values, changed, groups), model_class


def _as_json(counts: int | tuple[int, ...]) -> int | list[int]:
    return list(counts) if isinstance(counts, tuple) else counts


def _uneven_target(
    config: Any, values: Mapping[str, Any], field: KVField, groups: Groups, layers: int
) -> tuple[dict[JSONPath, Any], Any, type]:
    """A Llama-like model with a number of KV heads for each layer."""
    counts = field.after(groups, layers)
    each = counts if isinstance(counts, tuple) else (counts,) * layers
    edits: dict[JSONPath, Any] = {(name,): value for name, value in uneven.config_values(config, each).items()}
    cls = uneven.config_class()
    target = api.config_from_dict(cls(num_hidden_layers=1), apply_edits(values, edits))
    return edits, target, uneven.model_class()


def _shipped_fields(config: Any, model: Callable[[], Any]) -> tuple[KVField, ...]:
    """The fields of a model's GQA form, with the KV heads that it has now: a native model has all its heads."""
    shipping.check_native(config)
    counts = shipping.head_counts(model())
    grouped = shipping.is_shipped(str(config.model_type))
    fields = []
    for name, heads in zip(shipping.field_names(), counts, strict=True):
        if heads is not None:
            stated = (getattr(config, name) if grouped else None) or heads
            fields.append(_field((name,), tuple(stated) if isinstance(stated, (list, tuple)) else (stated,), heads))
    return tuple(fields)


def _shipped_target(
    config: Any,
    values: Mapping[str, Any],
    native_class: type,
    fields: tuple[KVField, ...],
    groups: Groups,
    folder: Path | None,
    layers: int,
) -> tuple[dict[JSONPath, Any], Any, type]:
    """As `retarget`; fields that keep their heads are written too."""
    named = shipping.config_values(config, native_class, folder)
    edits: dict[JSONPath, Any] = {(name,): value for name, value in named.items()}
    edits |= {field.path: _as_json(field.after(groups, layers)) for field in fields}
    target_class = shipping.grouped_class(native_class)
    target = api.config_from_dict(target_class.config_class(), apply_edits(values, edits))
    return edits, target, target_class
