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
    values = _read_yaml(_text(path), str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds a {type(values).__name__}, not settings by name.")
    return parse_config(apply_overrides(values, overrides), where=str(path))


def _text(path: Path) -> str:
    """The file's text. A pipe of the shell's (`<(...)`) is a file too; anything else that never ends is not read."""
    try:
        if not path.is_file() and path.exists() and path.parent not in _PIPES:
            raise UsageError(f"{path}: is no regular file. Give a run's YAML file.")
        with open(path, "rb") as file:
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise UsageError(f"{path}: is longer than {_LONGEST:,} bytes, which no configuration is.")
        return data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not valid YAML ({error}).") from error
    except ValueError as error:  # a null character in the path
        raise UsageError(f"{str(path)!r}: is no path ({error}).") from error


class _Loader(yaml.SafeLoader):
    """Plain values alone: 2024-01-01 is the name of a folder here, not a day. A key that comes twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in getattr(node, "value", ()) if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None) if len(names) < _MOST_KEYS else None
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[:80]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str, where: str) -> Any:
    try:
        values = yaml.load(text, Loader=_Loader)
        _check_extent(values)
    except RecursionError:
        raise UsageError(f"{where}: not valid YAML (nested too deeply).") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(f"{where}: not valid YAML ({' '.join(str(error).split())[:300]}).") from error
    return values


def _check_extent(values: Any) -> None:
    """Refuse values that are endless or huge once their aliases are followed: a few lines of YAML can mean both."""
    seen = 0
    waiting = [(values, 0)]
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_VALUES:
            raise ValueError(f"more than {_DEEPEST} levels or {_MOST_VALUES:,} values, aliases followed")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for inner in (*value.keys(), *value.values())]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(inner, depth + 1) for inner in value]


def parse_config(values: dict[str, Any], *, where: str = "config") -> UptrainConfig:
    """Check settings against the schema. See `load_config` for what is raised."""
    try:
        return UptrainConfig.model_validate(values)
    except ValidationError as error:
        problems = [_problem(entry) for entry in error.errors()]
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise UsageError(f"{where}: {count}:\n" + "\n".join(f"  {line}" for line in problems)) from None


_DEEPEST, _MOST_VALUES, _LONGEST = 32, 100_000, 1 << 22
_SHOWN = 200
_MOST_KEYS = 1000
_PIPES = (Path("/dev/fd"), Path("/dev"), Path("/proc/self/fd"))


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return settings with `a.b=c` applied; c is read as YAML (`null`, `3`, `[x, y]`, `2B`).

    Raises:
        UsageError: if one is not of that form.
    """
    result = _copy(values)
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
        here[parts[-1]] = _override_value(text, override)
    return result


def _override_value(text: str, override: str) -> Any:
    """One value. On a command line `#` begins no comment: `--set output=runs/try #2` is a folder's name."""
    if not text:
        return None
    if "#" in text and text.lstrip()[:1] not in "[{\"'":
        return text.strip()
    return _read_yaml(text, f"--set {override[:200]!r}")


def _copy(values: dict[Any, Any]) -> dict[Any, Any]:
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
    shown = repr(given) if len(repr(given)) <= _SHOWN else repr(given)[:_SHOWN] + " ..."
    if not name:
        return str(message).replace("\n", "\n  ")
    return f"{name}={shown}: {message}." if not isinstance(given, dict) else f"{name}: {message}."


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
    return next((section for arg in get_args(annotation) if (section := _section(arg))), None)
