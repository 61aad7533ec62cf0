"""README.md keeps its word: bash blocks below `<!-- test -->` are run, and no command names what is not there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import factories
from tests.support import Command

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TESTED = re.compile(r"<!-- test -->\s*```bash\n(.*?)```", re.DOTALL)
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def text() -> str:
    if not README.is_file():
        pytest.skip("no README.md yet")
    return README.read_text("utf-8")


def commands(pattern: re.Pattern[str]) -> list[list[str]]:
    """The commands of the blocks, split into words; comments left out, continued lines joined."""
    lines = "".join(pattern.findall(text())).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks() -> list[str]:
    return TESTED.findall(README.read_text("utf-8")) if README.is_file() else []


@pytest.mark.parametrize("block", blocks())
def test_block_runs(block: str, tmp_path: Path) -> None:
    """In an empty folder that holds a small model at path/to/model, the tools of this environment first in line."""
    factories.make(tmp_path / "path" / "to" / "model")
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


def test_scripts_that_are_named_exist() -> None:
    for words in commands(BASH):
        for word in words:
            if word.startswith(("scripts/", "configs/")):
                assert (ROOT / word).exists(), " ".join(words)


def test_options_that_are_named_exist(command: Command) -> None:
    for words in commands(BASH):
        if words[0] not in ("gqa", "gqa-convert"):
            continue
        arguments = words[1:2] if words[0] == "gqa" else []
        shown = command(words[0], *arguments, "--help")
        assert shown.code == 0, " ".join(words)
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in shown.out, " ".join(words)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target
