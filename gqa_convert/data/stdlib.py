"""The demo's text: the Python standard library's own source files and docstrings, as found on this machine.

A module is held out by a hash of its dotted name alone, so a module never changes sides from one Python version to the
next, whatever else comes or goes.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gqa_convert.errors import UsageError

HELD_OUT_PERCENT = 8

_OUTSIDE_THE_LIBRARY = frozenset(["site-packages", "dist-packages", "__pycache__", "ensurepip"])
# Tests, tables and generated text, and a package later Pythons no longer have: not what the model should learn.
_UNLIKE_THE_REST = frozenset(["test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"])
_SKIPPED_NAMES = frozenset(["html.entities", "sitecustomize", "usercustomize"])
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Module:
    """One source file of the standard library."""

    name: str
    path: Path

    @property
    def held_out(self) -> bool:
        """Whether training never sees this module."""
        return is_held_out(self.name)

    def text(self) -> str:
        """Read the file by its own declared encoding."""
        with tokenize.open(self.path) as file:
            return file.read()


def is_held_out(name: str) -> bool:
    """Say whether the module of this dotted name belongs to the held-out set (about 8 in 100 do)."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def collect(root: Path | None = None) -> list[Module]:
    """List the standard library's readable modules, ordered by name.

    Args:
        root: folder to walk; the running Python's standard library by default.

    Raises:
        UsageError: if the folder holds no source file (a Python that ships compiled modules only).
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    modules = (Module(_dotted_name(path.relative_to(folder)), path) for path in folder.rglob("*.py"))
    kept = sorted((m for m in modules if _is_text(m, folder)), key=lambda m: m.name)
    if not kept:
        raise UsageError(f"{folder}: no standard-library sources (*.py). Use a Python that ships them.")
    return kept


def split(modules: Iterable[Module]) -> tuple[list[Module], list[Module]]:
    """Part modules into (training, held out), keeping their order."""
    listed = list(modules)
    return [m for m in listed if not m.held_out], [m for m in listed if m.held_out]


def _dotted_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _is_text(module: Module, folder: Path) -> bool:
    parts = module.path.relative_to(folder).with_suffix("").parts
    return (
        not (_OUTSIDE_THE_LIBRARY | _UNLIKE_THE_REST).intersection(parts[:-1])
        and module.name not in _SKIPPED_NAMES
        and not any(part.startswith(_SKIPPED_PREFIXES) for part in parts)
        and module.path.stat().st_size > 0
    )


def training_texts() -> Iterator[str]:
    """Source files of the modules that the embedded model was trained on."""
    yield from _texts(0)


def held_out_texts() -> Iterator[str]:
    """Source files of the modules that it has never seen."""
    yield from _texts(1)


def _texts(side: int) -> Iterator[str]:
    from gqa_convert.data import stdlib

    for module in stdlib.split(stdlib.collect())[side]:
        yield module.text()


def some_training_texts() -> Iterator[str]:
    """A sample of the modules that the embedded model was trained on: enough for a demonstration, quick to tokenise."""
    yield from _sample(_texts(0), every=6)


def some_held_out_texts() -> Iterator[str]:
    """A sample of the modules that it has never seen."""
    yield from _sample(_texts(1), every=6)


def _sample(texts: Iterator[str], every: int) -> Iterator[str]:
    return islice(texts, 0, None, every)


def documentation_texts() -> Iterator[str]:
    """English prose that every Python brings along: the language reference's topics, and the modules' docstrings.

    The docstrings are those of the modules that `training_texts` gives, a document per module.
    """
    from pydoc_data.topics import topics

    yield from topics.values()
    for text in _texts(0):
        documented = docstrings(text)
        if documented:
            yield documented


def docstrings(source: str) -> str:
    """The docstrings of a module's source, in its order, with an empty line between them; empty if it has none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates that carry a .py name
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(text for text in texts if text)
