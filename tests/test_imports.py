"""Imports go down only, and the light part of the package stays light."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gqa_convert

PACKAGE = Path(gqa_convert.__file__).parent

# From the ground up: one room, or one module that stands apart from its room, belongs to one floor. A module belongs to
# the longest prefix that fits it and may import from lower floors and from its own room (the first part of its name);
# imports inside functions count, imports for type checkers do not.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "console", "modeling.auto"),
    ("", "heads", "progress", "outcome", "rooms"),
    ("checkpoint", "merge", "data"),
    ("modeling", "budget"),
    ("hf",),
    ("tiny",),
    ("anatomy", "conversion.recipe"),
    ("calibrate", "conversion.routes"),
    ("conversion", "evaluate.tasks", "evaluate.models"),
    ("contract", "evaluate", "uptrain"),
    ("demo", "report"),
    ("cli", "interface"),
)
UPWARD = {
    "uptrain.__main__": "what `accelerate launch -m gqa_convert.uptrain` runs: the command itself, under a launcher",
    "modeling.auto": "makes a family's classes when one is asked for; imported with the package, so it lies low",
}
"""Modules that import from above, each with its reason."""
LEVEL = {prefix: level for level, layer in enumerate(LAYERS) for prefix in layer}

LIGHT = [
    "errors",
    "heads",
    "conversion.recipe",
    "progress",
    "console",
    "merge.registry",
    "budget.arithmetic",
    "cli.main",
    "interface",
    "outcome",
]
HEAVY = ["torch", "transformers", "numpy", "safetensors", "huggingface_hub", "datasets", "accelerate", "pandas"]


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return names


def imports(path: Path) -> Iterator[str]:
    """The package's own modules that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("gqa_convert.") for name in names if name.startswith("gqa_convert."))


def layer_of(name: str) -> int:
    """The layer of a module, or of a name imported from one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        level = LEVEL.get(".".join(parts[:end]))
        if level is not None:
            return level
    return 0 if hasattr(gqa_convert, parts[0]) and parts[0] not in modules() else -1


def test_every_module_has_a_layer() -> None:
    assert [name for name in modules() if layer_of(name) < 0] == []


def test_imports_go_down_only() -> None:
    wrong = []
    for name, path in modules().items():
        if name in UPWARD:
            continue
        room, level = name.split(".")[0], layer_of(name)
        for imported in imports(path):
            home = gqa_convert._HOMES.get(imported, "").removeprefix("gqa_convert.") or imported
            target = home.split(".")[0]
            allowed = layer_of(home) <= level if target == room else layer_of(home) < level
            if not allowed:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_transformers_internals_are_met_in_two_files() -> None:
    """One maps raw keys, one loads single layers: a new release of transformers is looked at there."""
    private = ("transformers.conversion_mapping", "transformers.core_model_loading", "transformers.initialization")
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(f'"{name}"' in path.read_text() or f"{name} import" in path.read_text() for name in private)
    }
    assert users <= {"hf/api.py", "hf/partial.py"}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_their_top(name: str) -> None:
    code = f"import gqa_convert.{name}, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["gqa-convert", "--help"],
        ["gqa-convert", "--version"],
        ["gqa", "plan", "-h"],
        ["gqa", "families"],
        ["gqa", "--help"],
        ["gqa", "--version"],
        ["gqa", "convert", "--help"],
        ["gqa", "methods"],
        ["gqa-convert", "--nonsense"],
    ],
    ids=" ".join,
)
def test_help_imports_no_torch_and_answers_at_once(arguments: list[str]) -> None:
    code = (
        "import json, sys; from gqa_convert.cli import main as cli\n"
        "try: {'gqa': cli.main, 'gqa-convert': cli.convert_main}[sys.argv[0]]()\n"
        f"except SystemExit: print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    script = f"import sys; sys.argv = {arguments!r}\n{code}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert after.ru_utime - before.ru_utime < 2.0, "seconds of processor time"
