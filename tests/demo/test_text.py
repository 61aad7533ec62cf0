"""The text: found, ordered, and split the same way everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gqa_convert.data.stdlib import collect, is_held_out, split
from gqa_convert.errors import UsageError


def test_split_parts_every_module_once() -> None:
    modules = collect()
    train, held_out = split(modules)
    train_names, held_out_names = {m.name for m in train}, {m.name for m in held_out}
    assert not train_names & held_out_names
    assert len(train) + len(held_out) == len(modules) == len(train_names | held_out_names)
    assert len(train) > 300
    assert 0.03 < len(held_out) / len(modules) < 0.13


def test_side_depends_on_the_name_alone() -> None:
    held_out = ["argparse", "warnings", "queue", "netrc", "filecmp", "xmlrpc.server", "email.policy"]
    train = ["typing", "json.decoder", "inspect", "tarfile", "collections", "asyncio.tasks", "turtle"]
    assert [is_held_out(name) for name in held_out + train] == [True] * len(held_out) + [False] * len(train)


def test_order_is_by_name_and_repeatable() -> None:
    names = [m.name for m in collect()]
    assert names == sorted(names) == [m.name for m in collect()]


def test_library_only(tmp_path: Path) -> None:
    for name in (
        "queue.py",
        "json/__init__.py",
        "json/decoder.py",
        "site-packages/torch/nn.py",
        "test/test_os.py",
        "unittest/test/case.py",
        "encodings/cp1252.py",
        "_sysconfigdata__linux.py",
        "config-3.12-linux/tool.py",
        "html/entities.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    (tmp_path / "empty.py").touch()
    assert [m.name for m in collect(tmp_path)] == ["json", "json.decoder", "queue"]


def test_declared_encoding_is_honoured(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    assert "é" in collect(tmp_path)[0].text()


def test_no_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no standard-library sources"):
        collect(tmp_path)


def test_text_imports_no_torch() -> None:
    code = "import sys, gqa_convert.data.stdlib, gqa_convert.demo.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
