"""Reads a run's configuration: YAML, overrides by `--set a.b=c`, every problem reported at once with what was meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gqa_convert.errors import UsageError
from gqa_convert.uptrain.config import UptrainConfig


def load_config(path: Path, overrides: Sequence[str] = ()) -> UptrainConfig:
    """Read a YAML file and apply overrides.

    Raises:
        UsageError: naming every problem: unreadable file, unknown keys with their nearest match, wrong values.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({error}).") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds a {type(found).__name__}, not settings by name.")
    return parse_config(apply_overrides(found, overrides), where=str(path))


def parse_config(values: dict[str, Any], *, where: str = "config") -> UptrainConfig:
    """Check settings against the schema. See `load_config` for what is raised."""
    try:
        return UptrainConfig.model_validate(values)
    except ValidationError as error:
        problems = [_problem(entry) for entry in error.errors()]
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise UsageError(f"{where}: {count}:\n" + "\n".join(f"  {line}" for line in problems)) from None


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return settings with `a.b=c` applied; c is read as YAML (`null`, `3`, `[x, y]`, `2B`).

    Raises:
        UsageError: if one is not of that form.
    """
    result: dict[str, Any] = _copy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UsageError(f"--set {override!r}: write it as section.key=value.")
        here = result
        for part in parts[:-1]:
            below = here.get(part)
            if not isinstance(below, dict):
                below = here[part] = {}
            here = below
        try:
            here[parts[-1]] = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override!r}: the value is not valid YAML.") from error
    return result


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}


def _problem(entry: Any) -> str:
    path = [str(part) for part in entry["loc"]]
    name = ".".join(path)
    kind, message = entry["type"], entry["msg"]
    if kind == "extra_forbidden":
        known = _keys(path[:-1])
        near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
        return f"{name}: unknown. " + (f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}.")
    if kind == "missing":
        return f"{name}: must be set."
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    given = entry.get("input")
    if not name:
        return str(message).replace("\n", "\n  ")
    return f"{name}={given!r}: {message}." if not isinstance(given, dict) else f"{name}: {message}."


def _keys(path: Sequence[str]) -> list[str]:
    """The keys of the section at `path`."""
    model: type[BaseModel] = UptrainConfig
    for part in path:
        field = model.model_fields.get(part)
        section = _section(field.annotation) if field else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg))), None)
