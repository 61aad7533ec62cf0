"""A conversion planned anew from what the record in the converted folder says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.anatomy import read_fields
from gqa_convert.checkpoint.provenance import PROVENANCE, read_provenance
from gqa_convert.conversion.plan import ConvertPlan, plan
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.conversion.routes import recorded_route
from gqa_convert.errors import CheckpointError, UsageError, VerificationError
from gqa_convert.heads import Groups, HeadPlan
from gqa_convert.hf.loading import Source


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `gqa_convert.json` says, as far as checking a folder needs it.

    Attributes:
        known: whether there is a record at all.
        conversion: its part of that name; empty for a model that was trained only.
        recipe: how heads were merged.
        solved: digest of every tensor that came out of solving, by raw key; empty in records of before these were kept.
        trained: whether the folder's weights were trained after the conversion.
        final: digest of every tensor after the training, by raw key; empty as `solved`.
    """

    known: bool = False
    conversion: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    solved: Mapping[str, str] = field(default_factory=dict)
    trained: bool = False
    final: Mapping[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> Groups | None:
        """KV heads after the conversion: of every decoder layer alike, or of each."""
        after = self.conversion.get("after")
        each = after.get("kv_heads_per_layer") if isinstance(after, Mapping) else None
        if isinstance(each, list) and each and all(_count(count) for count in each):
            return HeadPlan(tuple(each))
        return _count(after.get("kv_heads")) if isinstance(after, Mapping) else None

    @property
    def cross_groups(self) -> int | None:
        """KV heads of cross-attention after the conversion, where they were set apart."""
        return _count(self.conversion.get("cross_groups"))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_record(folder: Path) -> Record:
    """Read the record of a converted folder; that of a folder without one knows nothing.

    Raises:
        CheckpointError: if it is damaged.
    """
    values = read_provenance(folder)
    if not values:
        return Record()
    where = folder / PROVENANCE
    conversion = _section(where, values, "conversion")
    return Record(
        known=True,
        conversion=conversion,
        recipe=_recipe(where, conversion),
        solved=_section(where, values, "solved"),
        trained="uptraining" in values,
        final=_section(where, values, "tensors"),
    )


def _section(where: Path, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where}: {name!r} holds a {type(section).__name__}, not a JSON object.")
    return section


def _recipe(where: Path, conversion: Mapping[str, Any]) -> Recipe:
    values = _section(where, conversion, "recipe")
    values = values or {name: conversion[name] for name in ("method", "seed") if name in conversion}
    try:
        return Recipe.from_json(values)
    except UsageError as error:
        raise CheckpointError(f"{where}: its recipe is none that this version knows ({error})") from error


def recorded_plan(
    source: str | Path, converted: Path, record: Record, *, trust_remote_code: bool = False
) -> ConvertPlan:
    """Plan the conversion that a record tells of; without one, that by mean to the KV heads of the converted folder.

    Raises:
        VerificationError: if the source cannot be converted so.
        GQAConvertError: if either folder cannot be read.
    """
    groups, cross_groups = record.groups, record.cross_groups
    if groups is None:
        fields = read_fields(Source.open(converted, trust_remote_code=trust_remote_code))
        groups = HeadPlan(fields[0].layers) if fields[0].layers else fields[0].kv_heads
        cross_groups = next((f.kv_heads for f in fields if f.cross and f.kv_heads != groups), None)
    try:
        return plan(
            source,
            groups=groups,
            cross_groups=cross_groups,
            out=converted,
            recipe=record.recipe,
            route=recorded_route(record.conversion),
            allow_slow=True,
            trust_remote_code=trust_remote_code,
        )
    except UsageError as error:
        raise VerificationError(f"{converted}: is no conversion of {source}: {error}") from error
