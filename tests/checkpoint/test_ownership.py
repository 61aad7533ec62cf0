"""What may be replaced: a folder that we wrote, as it was written, in a place that is nobody's home."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gqa_convert.checkpoint.ownership import check_replaceable, sign_card
from gqa_convert.checkpoint.provenance import PROVENANCE, write_provenance
from gqa_convert.errors import OutputError

from .helpers import single


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = single(tmp_path / "out")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("carried over")
    write_provenance(folder / PROVENANCE, {"conversion": {"method": "mean"}})
    return folder


def test_what_we_wrote_may_be_replaced(ours: Path) -> None:
    check_replaceable(ours)
    (ours / ".lock").touch()  # left by a killed run
    check_replaceable(ours)


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    check_replaceable(tmp_path / "new")


def test_the_card_of_a_report_is_ours_too(ours: Path) -> None:
    (ours / "README.md").write_text(sign_card("---\n---\n\n# A model\n"))
    check_replaceable(ours)
    (ours / "README.md").write_text("my own words")
    with pytest.raises(OutputError, match=r"README\.md"):
        check_replaceable(ours)


def change_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / PROVENANCE).read_text())
        change(record)
        (folder / PROVENANCE).write_text(json.dumps(record))

    return apply


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda f: (f / PROVENANCE).unlink(), "no gqa_convert"),
    "a text beside it": (lambda f: (f / "thesis.tex").write_text("x"), "thesis.tex"),
    "a hidden file": (lambda f: (f / ".notes").write_text("x"), ".notes"),
    "a file further down": (lambda f: (f / "sub" / "more.txt").write_text("x"), "sub/more.txt"),
    "an empty folder": (lambda f: (f / "plans").mkdir(), "plans"),
    "a link to a folder": (lambda f: (f / "data").symlink_to("/usr"), "data"),
    "a link in place of a file": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/etc/hostname")),
        "config.json",
    ),
    "training state": (lambda f: (f / "optimizer.pt").write_bytes(b"x"), "optimizer.pt"),
    "a file that was edited": (lambda f: (f / "sub" / "notes.txt").write_text("my own notes"), "sub/notes.txt"),
    "a record of another tool": (change_record(lambda r: r.update(tool={"name": "other"})), "no record of ours"),
    "a record that says nothing": (change_record(lambda r: r.pop("conversion")), "no record of ours"),
    "a damaged record": (lambda f: (f / PROVENANCE).write_text("{"), "no record of ours"),
    "a record elsewhere": (
        lambda f: ((f / PROVENANCE).rename(f.parent / "r.json"), (f / PROVENANCE).symlink_to("../r.json")),
        "no record of ours",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_provably_ours_is_kept(ours: Path, name: str) -> None:
    spoil, says = STRANGERS[name]
    spoil(ours)
    with pytest.raises(OutputError, match=says):
        check_replaceable(ours)


def test_records_of_before_the_list_allow_what_conversions_write(ours: Path) -> None:
    (ours / "sub" / "notes.txt").unlink()
    (ours / "sub").rmdir()
    (ours / "tokenizer.json").write_text("{}")
    change_record(lambda record: record.pop("files"))(ours)
    check_replaceable(ours)
    (ours / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"optimizer\.pt"):
        check_replaceable(ours)


@pytest.mark.parametrize("below", [".", "sub"])
def test_neither_home_nor_working_directory(ours: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("HOME", str(ours / below))
        with pytest.raises(OutputError, match="home directory"):
            check_replaceable(ours)
    monkeypatch.chdir(ours / below)
    with pytest.raises(OutputError, match="working directory"):
        check_replaceable(ours)
    (ours.parent / "link").symlink_to(ours)
    with pytest.raises(OutputError):
        check_replaceable(ours.parent / "link")


def test_the_root_and_mount_points(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        check_replaceable(Path("/"))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        disk = Path("/proc")
        if not os.path.ismount(disk):
            pytest.skip("no mount point to look at")
    try:
        with pytest.raises(OutputError, match="mount point"):
            check_replaceable(disk)
    finally:
        if disk.parent == tmp_path:
            subprocess.run(["umount", str(disk)], check=True)
