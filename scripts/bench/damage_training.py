"""The damage that fuzz_training.py does: to a run's configuration, text, tokens, model, checkpoints and folder."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_run import settings

from gqa_convert.uptrain.checkpoints import MARKER, STATE, _digests, _files

BASES: dict[str, dict[str, Any]] = {
    "stored": settings(),
    "streaming": settings(
        data={"streaming": True, "source": {"kind": "text", "paths": ["data/text.txt"], "documents": "line"}}
    ),
    "distilled": settings(
        data={"source": {"kind": "folder", "paths": ["data"], "pattern": "*.gz"}},
        objective={"distillation": {"teacher": "teacher", "cross_entropy_weight": 0.5}},
    ),
    "shards": settings(data={"source": {"kind": "parquet", "paths": ["data/text.parquet"]}}),
}  # fmt: skip
SAME_WEIGHTS = ("text", "tokens", "checkpoint", "metrics", "folder")
"""Damage after which a run that ends well must have the weights of the undisturbed one."""

INTEGERS = [-1, 0, 1, 2, 3, 7, 100, 2**15, 2**31, 2**63, 2**64, 10**30]
VALUES: list[Any] = [
    None, True, False, "", " ", "auto", "none", "never", "nan", "1e400", ".inf", "-.inf", "8k", "1e3", "2B", "-1",
    "0x10",
    "../run", "/", ".", "~", "a" * 5000, "\0", "\ud7ff\u2028", "é", "%s", "{x}", "$HOME", "run/checkpoints", "data",
    "data/text.jsonl", "data/*.jsonl", "/dev/null", "/dev/zero", "model", "json:loads", "nothing:here", "os:getcwd",
    [], {}, [1], ["a", "b"], {"a": 1}, [[[[[]]]]], 0.5, -0.5, 1e-300, 1e300, float("inf"), float("nan"), 2024.1,
]  # fmt: skip


class Harm:
    """What a pickle that means harm does."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def mutate(draw: random.Random, work: Path) -> tuple[str, list[str], list[str], bool]:
    """Damage a case's folder.

    Returns:
        The kind of damage, what was done, overrides for the command line, and whether what is called whole afterwards
        must be whole (False where checksums were put right again after the damage).
    """
    kind = draw.choice(list(_KINDS))
    done: list[str] = []
    overrides: list[str] = []
    exact = True
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        try:
            exact &= _KINDS[kind](draw, work, done, overrides)
        except (OSError, EOFError, zlib.error, MemoryError, shutil.Error) as error:  # of what was damaged before
            done.append(f"no more: {type(error).__name__}")
            break
    return kind, done, overrides, exact


def _configuration(draw: random.Random, work: Path, done: list[str], overrides: list[str]) -> bool:
    path = work / "run.yaml"
    if draw.random() < 0.2:
        text = path.read_text()
        lines = text.splitlines(keepends=True)
        at = draw.randrange(len(lines))
        new = draw.choice(
            ["\t", "}\n", "[" * 2000, "&a [*a]\n", "? ", "- ", "!!python/object/apply:os.mkdir [harmed]\n", "\0",
             "a: &a [x, x]\n", "<<: *x\n", "--- \n", "%YAML 9\n", lines[at], "'", '"', ": : :\n", "# \n", "\ufeff"]
        )  # fmt: skip
        lines.insert(at, new)
        if draw.random() < 0.3:
            del lines[draw.randrange(len(lines))]
        path.write_text("".join(lines))
        done.append(f"line {at}: {new[:20]!r}")
        return False
    with_values = _yaml_of(path)
    if not isinstance(with_values, dict):
        return False
    places = list(_places(with_values))
    holder, key, name = draw.choice(places)
    act = draw.choice(["value", "value", "value", "integer", "integer", "delete", "rename", "more", "set", "set"])
    value: Any = draw.choice(INTEGERS) if act == "integer" else draw.choice(VALUES)
    if act == "set":
        section, field = draw.choice(_FIELDS)
        shown = json.dumps(value) if draw.random() < 0.5 else str(value).replace("\n", " ")
        overrides.append(f"{section}.{field}={shown}" if section else f"{field}={shown}")
        done.append(f"--set {overrides[-1][:60]}")
        return False
    if act == "delete":
        del holder[key]
    elif act == "rename":
        holder[f"{key}s"] = holder.pop(key)
    elif act == "more":
        section, field = draw.choice(_FIELDS)
        inner = with_values.setdefault(section, {}) if section else with_values
        if isinstance(inner, dict):
            inner[field] = value = draw.choice([*VALUES, *INTEGERS])
            name = f"{section}.{field}"
    else:
        holder[key] = value
    path.write_text(yaml.safe_dump(with_values, sort_keys=False, allow_unicode=draw.random() < 0.5))
    done.append(f"{act} {name} {str(value)[:40]!r}")
    return False


def _yaml_of(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _fields() -> list[tuple[str, str]]:
    from gqa_convert.uptrain.config import UptrainConfig

    fields: list[Any] = []
    for name, field in UptrainConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        fields += [("", name)] if inner is None else [(name, key) for key in inner]
    return fields


_FIELDS = _fields()


def _places(values: dict[str, Any], prefix: str = "") -> list[tuple[dict[str, Any], str, str]]:
    places: list[Any] = []
    for key, value in values.items():
        places.append((values, key, f"{prefix}{key}"))
        if isinstance(value, dict):
            places += _places(value, f"{prefix}{key}.")
    return places


def _text(draw: random.Random, work: Path, done: list[str], overrides: list[str]) -> bool:
    source = _yaml_of(work / "run.yaml")["data"]["source"]
    path = work / ("data/text.jsonl.gz" if source["kind"] == "folder" else source["paths"][0])
    if draw.random() < 0.4 and path.is_file() and not path.is_symlink() and path.suffix in (".jsonl", ".gz", ".txt"):
        packed = path.suffix == ".gz"
        try:
            data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        except (OSError, EOFError, zlib.error):
            return True
        lines = data.splitlines(keepends=True)
        at = draw.randrange(len(lines)) if lines else 0
        act = draw.choice(["drop", "double", "swap", "reverse", "insert", "edit"])
        if act == "drop" and lines:
            del lines[at]
        elif act == "double" and lines:
            lines.insert(at, lines[at])
        elif act == "swap" and lines:
            lines[at], lines[0] = lines[0], lines[at]
        elif act == "reverse":
            lines.reverse()
        elif act == "edit" and lines:
            lines[at] = lines[at].replace(b"cat", b"dog")
        else:
            bad = [
                b"{}\n", b"[]\n", b'{"text": 5}\n', b'{"text": null}\n', b'{"text": "\\ud800"}\n',
                b"\xff\xfe\n", b"\0\n", b'{"text": "x", "text": "y"}\n', b"[" * 30_000 + b"\n", b"NaN\n", b"\r\n",
                b'{"text": ["cat"]}\n', b'{"text": "' + b"cat " * 50_000 + b'"}\n', b'{"other": "x"}\n',
                b"9" * 5000 + b"\n",
            ]  # fmt: skip
            lines.insert(at, draw.choice(bad))
        data = b"".join(lines)
        path.write_bytes(gzip.compress(data) if packed else data)
        done.append(f"{path.name} {act} line {at}")
    else:
        _harm_file(draw, path, done)
    return True


def _tokens(draw: random.Random, work: Path, done: list[str], overrides: list[str]) -> bool:
    files = sorted(p for p in (work / "run" / "tokens").rglob("*") if p.is_file())
    if not files:
        return True
    path = draw.choice(files)
    if path.suffix == ".json" and draw.random() < 0.6:
        _harm_json(draw, path, done)
    else:
        _harm_file(draw, path, done)
    return True


def _checkpoint(draw: random.Random, work: Path, done: list[str], overrides: list[str]) -> bool:
    folders = sorted(p for p in (work / "run" / "checkpoints").glob("step-*") if p.is_dir())
    if not folders:
        return True
    folder = folders[-1] if draw.random() < 0.7 else draw.choice(folders)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if not files:
        return True
    path = draw.choice(files)
    act = draw.random()
    if path.name in (MARKER, STATE) and act < 0.7:
        _harm_json(draw, path, done)
    elif path.name == "optimizer.pt" and act < 0.5:
        torch.save(
            draw.choice([Harm(), {"state": Harm(), "param_groups": []}, [], {}, {"state": {}, "param_groups": [{}]}]),
            path,
        )
        done.append("optimizer.pt replaced")
    elif path.name == ".metadata" and act < 0.5:
        path.write_bytes(pickle.dumps(draw.choice([Harm(), [], {"a": 1}, os.mkdir])))
        done.append(".metadata replaced")
    else:
        _harm_file(draw, path, done)
    if path.name != MARKER and draw.random() < 0.5 and folder.is_dir():
        _mark_again(folder)
        done.append("marked again")
        return False
    return True


def _mark_again(folder: Path) -> None:
    """Put a checkpoint's checksums right."""
    paths = [path for path in _files(folder) if path.name != MARKER]
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    marker = folder / MARKER
    if marker.is_dir():
        return
    marker.unlink(missing_ok=True)
    marker.write_text(json.dumps({"step": 4, "files": files}))


def _metrics(draw: random.Random, work: Path, done: list[str], overrides: list[str]) -> bool:
    path = work / "run" / "metrics.jsonl"
    if draw.random() < 0.5 and path.is_file():
        with open(path, "ab") as file:
            file.write(
                draw.choice(
                    [b"5\n", b"[]\n", b'{"step": "x"}\n', b"\xff\n", b'{"step": 3, "ki', b"[" * 20_000, b"null\n"]
                )
            )
        done.append("a line more in metrics.jsonl")
    else:
        _harm_file(draw, path, done)
    return True


def _model(draw: random.Random, work: Path, done: list[str], overrides: list[str]) -> bool:
    files = sorted(p for name in ("model", "teacher") for p in (work / name).rglob("*") if p.is_file())
    path = draw.choice(files)
    if path.suffix == ".json" and draw.random() < 0.7:
        _harm_json(draw, path, done)
    elif path.suffix == ".safetensors" and draw.random() < 0.4 and not path.is_symlink():
        from safetensors.torch import load_file, save_file

        try:
            weights = load_file(path)
        except Exception:  # damaged before
            return False
        name = draw.choice(sorted(weights))
        weights[name].view(-1)[draw.randrange(weights[name].numel())] = draw.choice([float("nan"), float("inf"), 1e30])
        save_file(weights, path, {"format": "pt"})
        done.append(f"{path.parent.name}: a value of {name}")
    else:
        _harm_file(draw, path, done)
    return False


def _folder(draw: random.Random, work: Path, done: list[str], overrides: list[str]) -> bool:
    run = work / "run"
    act = draw.choice(
        ["final", "final file", "final link", "saving", "lock", "trackers", "stage", "step file", "odd step"]
    )
    if act == "final":
        (run / "final").mkdir(exist_ok=True)
        (run / "final" / "thesis.txt").write_text("years of work")
    elif act == "final file" and not (run / "final").exists():
        (run / "final").write_text("text")
    elif act == "final link" and not (run / "final").exists():
        (run / "final").symlink_to("../model" if draw.random() < 0.5 else "final")
    elif act == "saving":
        (run / "checkpoints" / ".saving-00000006").mkdir(parents=True, exist_ok=True)
    elif act == "lock" and (run / ".lock").is_file():
        (run / ".lock").unlink()
        if draw.random() < 0.5:
            (run / ".lock").mkdir()
    elif act == "trackers":
        (run / "trackers").write_text("no folder") if not (run / "trackers").exists() else None
    elif act == "stage":
        left = run / "tokens" / f".{'a' * 16}-train.tmp-1-00000000"
        left.mkdir(parents=True, exist_ok=True)
        (left / "tokens.bin").write_bytes(b"half")
    elif act == "step file" and (run / "checkpoints").is_dir() and not (run / "checkpoints" / "step-00000009").exists():
        (run / "checkpoints" / "step-00000009").write_text("no folder")
    else:
        for name in ("step-99999999999999999999", "step-00000007", "step-x", "step-"):
            (run / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
    done.append(act)
    return True


def _harm_file(draw: random.Random, path: Path, done: list[str]) -> None:
    """Damage a file's bytes, or put something else in its place."""
    if not path.is_file() or path.is_symlink():
        return
    data = bytearray(path.read_bytes())
    act = draw.choice(
        ["flip", "flip", "flip", "cut", "empty", "more", "noise", "remove", "folder", "fifo", "link", "zero", "shut"]
    )
    if act == "flip" and data:
        for _ in range(draw.choice([1, 1, 8])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif act == "cut":
        path.write_bytes(data[: draw.randrange(len(data) + 1)])
    elif act in ("empty", "more", "noise"):
        path.write_bytes({"empty": b"", "more": bytes(data) + b"\0" * 9, "noise": draw.randbytes(len(data) or 9)}[act])
    elif act == "shut":
        path.chmod(0)
    elif act != "flip":
        path.unlink()
        if act == "folder":
            path.mkdir()
        elif act == "fifo":
            os.mkfifo(path)
        elif act == "link":
            path.symlink_to(draw.choice(["/dev/zero", path.name, "/dev/null", "../../../nothing"]))
        elif act == "zero":
            path.symlink_to("/dev/zero")
    done.append(f"{path.name} {act}")


def _harm_json(draw: random.Random, path: Path, done: list[str]) -> None:
    """Change a value somewhere in a JSON file, or its text."""
    if not path.is_file() or path.is_symlink():
        return
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError):
        return
    if draw.random() < 0.2 or not isinstance(value, dict) or not value:
        path.write_text(draw.choice(["{}", "[]", "5", "null", '"x"', "[" * 50_000, "{", "", '{"a": ' * 2000, "\0"]))
        done.append(f"{path.name} replaced")
        return
    holder, key, name = draw.choice(_places(value))
    if draw.random() < 0.25:
        del holder[key]
    else:
        holder[key] = draw.choice([v for v in (*VALUES, *INTEGERS) if v != "\ud7ff\u2028"])
    path.write_text(json.dumps(value))
    done.append(f"{path.name}: {name[:60]}")


_KINDS: dict[str, Callable[[random.Random, Path, list[str], list[str]], bool]] = {
    "configuration": _configuration,
    "text": _text,
    "tokens": _tokens,
    "checkpoint": _checkpoint,
    "metrics": _metrics,
    "model": _model,
    "folder": _folder,
}
