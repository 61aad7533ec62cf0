"""The KV fields of any model, and the configuration and class that it has with other values of them.

Families without a setting of their own (`gqa_convert.modeling`) get both from the GQA form of their class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.kv_fields import KVField, apply_edits, config_edits, find_kv_fields
from gqa_convert.anatomy.kv_fields import Path as JSONPath
from gqa_convert.hf import api
from gqa_convert.modeling import shipping


def fields_of(config: Any, values: Mapping[str, Any], model: Callable[[], Any]) -> tuple[KVField, ...]:
    """Return a model's KV fields, the main one first; empty if it has none and cannot be given any.

    `model` gives the model itself, with or without memory; it is called for families without a setting of their own.

    Raises:
        UnsupportedModelError: if this model of a family that could be given some keeps no KV cache.
    """
    model_type = str(config.model_type)
    if shipping.ships(model_type) or shipping.is_shipped(model_type):
        return _shipped_fields(config, model)
    return find_kv_fields(config, values)


def retarget(
    config: Any,
    values: Mapping[str, Any],
    model_class: type,
    fields: tuple[KVField, ...],
    groups: int,
    folder: Path | None = None,
) -> tuple[dict[JSONPath, Any], Any, type]:
    """Work out the model with `groups` KV heads: the JSON edits, the configuration they produce, and its class.

    Args:
        config: the source's configuration.
        values: its config.json as parsed.
        model_class: the source's class.
        fields: all its KV fields; those that have more KV heads than they are to have are changed.
        groups: KV heads after the conversion.
        folder: the source's folder, whose tokenizer may need naming.

    Raises:
        UnsupportedModelError: if no configuration can say so.
    """
    changed = tuple(field for field in fields if field.kv_heads > field.wanted(groups))
    if not changed:
        return {}, config, model_class
    if shipping.ships(str(config.model_type)):
        return _shipped_target(config, values, model_class, fields, groups, folder)
    return *config_edits(config, values, changed, groups), model_class


def _shipped_fields(config: Any, model: Callable[[], Any]) -> tuple[KVField, ...]:
    """The fields of a model's GQA form, with the KV heads that it has now: a native model has all its heads."""
    shipping.check_native(config)
    counts = shipping.head_counts(model())
    grouped = shipping.is_shipped(str(config.model_type))
    return tuple(
        KVField(path=(name,), kv_heads=(getattr(config, name) if grouped else None) or heads, query_heads=heads)
        for name, heads in zip(shipping.field_names(), counts, strict=True)
        if heads is not None
    )


def _shipped_target(
    config: Any,
    values: Mapping[str, Any],
    native_class: type,
    fields: tuple[KVField, ...],
    groups: int,
    folder: Path | None,
) -> tuple[dict[JSONPath, Any], Any, type]:
    """As `retarget`; fields that keep their heads are written too."""
    named = shipping.config_values(config, native_class, folder)
    edits: dict[JSONPath, Any] = {(name,): value for name, value in named.items()}
    edits |= {field.path: field.wanted(groups) for field in fields}
    target_class = shipping.grouped_class(native_class)
    target = api.config_from_dict(target_class.config_class(), apply_edits(values, edits))
    return edits, target, target_class
