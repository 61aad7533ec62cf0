"""Rotary settings of a tiny model: the same kind of rotation on fewer dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HEAD_DIMS = (8, 16, 32, 64)
FACTOR_NAMES = ("partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_pct")


def rope_dicts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every rotary setting of a config: one, or one a layer type."""
    for name in ("rope_parameters", "rope_scaling"):
        params = fields.get(name)
        if not isinstance(params, dict):
            continue
        yield params
        yield from (entry for entry in params.values() if isinstance(entry, dict))


def rotary_dim(fields: dict[str, Any], params: dict[str, Any], head_dim: int) -> int:
    """Return how many dimensions of a head the setting `params` rotates."""
    factors = [source[name] for source in (params, fields) for name in FACTOR_NAMES if source.get(name)]
    return int(head_dim * factors[0]) if factors else head_dim


def smallest_head_dim(fields: dict[str, Any]) -> int:
    """Return the smallest head_dim on which every rotary setting of the config still works."""

    def works(head_dim: int) -> bool:
        for params in (*rope_dicts(fields), {}):
            rotated = rotary_dim(fields, params, head_dim)
            need = 2 * (len(params["mrope_section"]) + 1) if params.get("mrope_section") else 2
            if rotated % 2 or rotated < need:
                return False
        return True

    return next((dim for dim in HEAD_DIMS if works(dim)), HEAD_DIMS[-1])


def share(total: int, parts: list[int]) -> list[int]:
    """Split `total` in the proportions of `parts`, each part at least 1."""
    scale = total / sum(parts)
    shares = [max(1, int(part * scale)) for part in parts]
    shares[-1] += total - sum(shares)
    return shares


def shrink_rope(params: dict[str, Any], fields: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Return the rotary setting `params` fitted to `head_dim`; scaling type, base and factors stay as they are."""
    small: dict[str, Any] = {}
    half = rotary_dim(fields, params, head_dim) // 2
    for name, value in params.items():
        if isinstance(value, dict):
            small[name] = shrink_rope(value, fields, head_dim)
        elif name == "mrope_section" and isinstance(value, list):
            small[name] = share(half, value)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            small[name] = [value[i * len(value) // half] for i in range(half)]
        else:
            small[name] = value
    return small
