"""How many KV heads each layer is to have: what a user may ask for, made into a plan for a model. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.files import MAX_CONFIG_BYTES, parse_object, read_regular
from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.heads import Groups, HeadPlan, divisors

PER_LAYER = "groups_per_layer"
"""The key of a JSON object that holds the KV heads of each layer."""


def as_groups(groups: int | Sequence[int] | HeadPlan) -> Groups:
    """Return KV heads of all layers alike, or of each, from what a caller gives.

    Raises:
        UsageError: if a number is none, or below 1.
    """
    if isinstance(groups, bool):
        raise UsageError(f"KV heads of each layer: {groups!r} is no whole number.")
    if isinstance(groups, int):
        return groups
    if not isinstance(groups, HeadPlan):
        strange = [each for each in groups if not isinstance(each, int) or isinstance(each, bool)]
        if strange:
            raise UsageError(f"KV heads of each layer: {strange[0]!r} is no whole number.")
        groups = HeadPlan(tuple(groups))
    return groups


def asked_groups(groups: int | None, per_layer: str | None, budget: str | None = None) -> Groups | None:
    """Return what `--groups` or `--groups-per-layer` asks for; None where `--kv-budget` leaves it to be found.

    Raises:
        UsageError: unless just one of them is given.
    """
    given = [each for each in (groups, per_layer, budget) if each is not None]
    if len(given) != 1:
        seen = "only one of them can be used" if given else "Missing option"
        raise UsageError(
            f"--groups, --groups-per-layer, --kv-budget: {seen}. Give the KV heads of all layers, of each, or a budget."
        )
    return groups if per_layer is None else read_groups(per_layer)


def read_groups(text: str) -> HeadPlan:
    """Read `--groups-per-layer`: numbers with commas between, or the path of a JSON file that holds them.

    The file has a list, or an object with a list under `groups_per_layer`, as `gqa_convert.json` and the files that
    `--kv-budget` writes have.

    Raises:
        UsageError: if it is neither.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdigit() for part in parts):
        return HeadPlan(tuple(map(int, parts)))
    path = Path(os.path.expanduser(text))
    if not path.is_file():
        raise UsageError(
            f"--groups-per-layer {text}: neither numbers with commas between (8,8,4,2) nor a JSON file that is there."
        )
    try:
        raw = read_regular(path, MAX_CONFIG_BYTES).decode("utf-8")
        values: Any = parse_object(path, raw if raw.lstrip("\ufeff \t\r\n")[:1] == "{" else f'{{"{PER_LAYER}": {raw}}}')
    except (CheckpointError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"--groups-per-layer {path}: {error}") from error
    counts = values.get(PER_LAYER) or _recorded(values)
    if not isinstance(counts, list) or not counts or any(not isinstance(c, int) or isinstance(c, bool) for c in counts):
        raise UsageError(f"--groups-per-layer {path}: holds no list of whole numbers, one for each layer.")
    return HeadPlan(tuple(counts))


def _recorded(values: Any) -> Any:
    for name in ("conversion", "after"):
        values = values.get(name) if isinstance(values, dict) else None
    return values.get("kv_heads_per_layer") if isinstance(values, dict) else None


def kept_layers(text: str, layers: int) -> frozenset[int]:
    """Read `--keep-layers`: numbers from 0, ranges (`0-3`), `first` and `last`, with commas between.

    Raises:
        UsageError: if a part is none of these, or there is no such layer.
    """
    kept: set[int] = set()
    for part in filter(None, (each.strip().lower() for each in text.split(","))):
        start, dash, end = {"first": "0", "last": str(layers - 1)}.get(part, part).partition("-")
        if not start.isdigit() or (dash and not end.isdigit()):
            raise UsageError(f"--keep-layers {text}: {part!r} is no layer; give numbers, ranges (0-3), first or last.")
        numbers = range(int(start), int(end if dash else start) + 1)
        if not numbers or numbers[-1] >= layers:
            raise UsageError(f"--keep-layers {text}: {part!r} is not among the layers 0 to {layers - 1}.")
        kept.update(numbers)
    return frozenset(kept)


def planned_groups(
    groups: Groups, present: Sequence[int], *, keep_layers: str = "", tensor_parallel: int = 1, min_groups: int = 1
) -> Groups:
    """Return the KV heads after a conversion: one number where every layer gets the same, else one for each layer.

    Args:
        groups: what is asked for.
        present: KV heads of each decoder layer now.
        keep_layers: layers that keep all their heads; see `kept_layers`.
        tensor_parallel: devices that share the heads of a layer: no layer may get a number that they cannot share.
        min_groups: no layer may get fewer.

    Raises:
        UsageError: if two of these do not go together; the message names the layer.
    """
    layers = len(present)
    kept = kept_layers(keep_layers, layers)
    if isinstance(groups, HeadPlan) and len(groups.counts) != layers:
        raise UsageError(
            f"--groups-per-layer: KV heads of {len(groups.counts)} layers, but the decoder has {layers}. Give one "
            "number for each layer, first to last."
        )
    counts = [groups] * layers if isinstance(groups, int) else list(groups.counts)
    counts = [
        present[layer] if layer in kept else min(count, present[layer]) if isinstance(groups, int) else count
        for layer, count in enumerate(counts)
    ]
    for layer, count in enumerate(counts):
        check_count(count, layer, tensor_parallel=tensor_parallel, min_groups=min_groups)
    if isinstance(groups, int) and not kept:
        return groups
    plan = HeadPlan(tuple(counts))
    return plan if plan.even is None else plan.even


def check_count(count: int, layer: int, *, tensor_parallel: int, min_groups: int) -> None:
    """Refuse a number of KV heads that constraints rule out. Raises UsageError."""
    for name, value in (("--tp", tensor_parallel), ("--min-groups", min_groups)):
        if value < 1:
            raise UsageError(f"{name} {value}: must be at least 1.")
    if count % tensor_parallel:
        raise UsageError(
            f"--tp {tensor_parallel}: layer {layer} would have {count} KV heads, which {tensor_parallel} devices "
            "cannot share without copies. Give it a multiple."
        )
    if count < min_groups:
        raise UsageError(f"--min-groups {min_groups}: layer {layer} would have {count} KV heads.")


def legal_counts(present: int, *, tensor_parallel: int = 1, min_groups: int = 1) -> tuple[int, ...]:
    """Return the KV heads that a layer with `present` may get, ascending; `present` itself always.

    A layer that keeps all its heads is no worse off than before, whatever the constraints.
    """
    return tuple(d for d in divisors(present) if d == present or (d % tensor_parallel == 0 and d >= min_groups))


def budget_bytes(text: str, before: int, at_groups: Callable[[int], int]) -> int:
    """Read `--kv-budget`: a share (`25%`), `groups=4`, or bytes per token (`12000`, `12KiB`).

    Args:
        text: what the user wrote.
        before: KV-cache bytes per token of the model as it is.
        at_groups: gives those with so many KV heads in every layer.

    Raises:
        UsageError: if it is none of these, or not below what the model takes now.
    """
    match = re.fullmatch(r"\s*(?:groups=(\d+)|(\d+(?:\.\d+)?)\s*(%|[kKmM]i?[bB]|[bB])?)\s*", text)
    if match is None:
        raise UsageError(f"--kv-budget {text}: give a share (25%), groups=4, or bytes per token (12000, 12KiB).")
    if match[1]:
        budget = at_groups(int(match[1]))
    elif match[3] == "%":
        budget = int(before * float(match[2]) / 100 + 1e-9)
    else:
        unit = (match[3] or "b").lower()
        size = {"k": 1, "m": 2}.get(unit[0], 0)
        budget = int(float(match[2]) * (1024 if "i" in unit else 1000) ** size)
    if budget >= before:
        raise UsageError(f"--kv-budget {text}: that is {budget} bytes per token, and the model takes {before} now.")
    return budget
