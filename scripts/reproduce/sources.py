"""The text: the standard library's modules as found on this machine, at the larger scale those of installed packages.

A module is held out by a hash of its dotted name, as for the embedded model.
"""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from gqa_convert.data import stdlib
from gqa_convert.data.stdlib import is_held_out

_LARGEST = 400_000
"""Bytes of a module; larger ones are tables."""


def stdlib_training() -> Iterator[str]:
    """The standard library's modules that are trained on."""
    return stdlib.training_texts()


def stdlib_held_out() -> Iterator[str]:
    """The others."""
    return stdlib.held_out_texts()


def installed_training() -> Iterator[str]:
    """The modules of the standard library and of every installed package that are trained on."""
    yield from stdlib_training()
    yield from _installed(held_out=False)


def installed_held_out() -> Iterator[str]:
    """The standard library's held-out modules: packages repeat themselves too much to be a fair test."""
    return stdlib_held_out()


def _installed(*, held_out: bool) -> Iterator[str]:
    root = Path(sysconfig.get_path("purelib"))
    for path in sorted(root.rglob("*.py")):
        if is_held_out(path.relative_to(root).as_posix()) != held_out or not 0 < path.stat().st_size <= _LARGEST:
            continue
        try:
            with tokenize.open(path) as file:
                yield file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue


def training_modules(text: str) -> list[str]:
    """All training modules of a `Scale.text`, in the order of a hash, so that a few are from all over."""
    import hashlib

    modules = {"stdlib": stdlib_training, "installed": installed_training}[text]()
    return sorted(modules, key=lambda module: hashlib.sha256(module.encode()).digest())


def training_file(path: Path, text: str, limit: int) -> Path:
    """Write training modules, one a line of JSON, for calibration; about `limit` characters of them."""
    import json

    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for module in training_modules(text):
            if written >= limit:
                break
            file.write(json.dumps({"text": module}) + "\n")
            written += len(module)
    return path
