"""The recipes of CONTRIBUTING.md work as they are printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gqa_convert import convert
from gqa_convert.heads import Grouping
from gqa_convert.merge import registry
from tests import factories

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")


@pytest.fixture
def median() -> Iterator[registry.MergeMethod]:
    (code,) = re.findall(r"<!-- test -->\s*```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), {"__name__": "recipe"})
    yield registry.get_method("median")
    del registry._METHODS["median"]


def test_the_new_method_merges(median: registry.MergeMethod) -> None:
    assert median.pool is not None
    heads = torch.tensor([[1.0, 5.0], [2.0, 9.0], [90.0, 6.0]])
    merged = median.pool(torch.cat([heads, heads]).flatten(), Grouping.contiguous(6, 2), 0)
    assert merged.tolist() == [2.0, 6.0, 2.0, 6.0]


def test_the_new_method_converts(median: registry.MergeMethod, tmp_path: Path) -> None:
    out = convert(factories.make(tmp_path / "source", "olmo2"), groups=2, method=median.name, verify="logits").out
    factories.load(out, "olmo2")


def test_paths_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:scripts|tests|gqa_convert|docs|configs)/[\w./-]+)`", TEXT):
        assert (Path(__file__).parents[1] / name).exists(), name


def test_the_map_names_what_is_there() -> None:
    root = Path(__file__).parents[1]
    package = root / "gqa_convert"
    text = (root / "docs" / "architecture.md").read_text("utf-8")
    named = {name for name in re.findall(r"`([\w/.]+)`", text) if "/" in name or name.endswith((".py", ".json"))}
    rooms = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert rooms == {name.rstrip("/") for line in lines for name in re.findall(r"`(\w+/)`", line.split("|")[1])}
    inside = {name.rstrip("/") for name in named}
    places = (root, package, *(package / room for room in rooms))
    assert [name for name in sorted(inside) if not any((place / name).exists() for place in places)] == []
