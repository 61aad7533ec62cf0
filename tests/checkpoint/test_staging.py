from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gqa_convert.checkpoint.ownership import check_replaceable
from gqa_convert.checkpoint.provenance import PROVENANCE, write_provenance
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.staging import check_output, staged_output
from gqa_convert.checkpoint.writer import TargetTensor, write_shard
from gqa_convert.errors import CheckpointError, OutputError

from .helpers import single


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return single(tmp_path / "source")


def stage(target: Path, source: Path, *, force: bool = False, needed_bytes: int = 0) -> AbstractContextManager[Path]:
    return staged_output(target, force=force, source=source, needed_bytes=needed_bytes)


def fill_and_raise(kind: type[BaseException], target: Path, source: Path, *, force: bool = False) -> None:
    with stage(target, source, force=force) as folder:
        (folder / "config.json").write_text("new")
        raise kind


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def old_model(folder: Path, text: str = "old") -> Path:
    """An output of an earlier run, by its own record."""
    folder.mkdir()
    (folder / "config.json").write_text(text)
    write_provenance(folder / PROVENANCE, {"conversion": {}})
    return folder


def test_the_folder_appears_only_when_it_is_whole(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    with stage(target, source) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
        assert not target.exists()
        assert folder.parent == tmp_path
        assert folder.name.startswith(f".out.tmp-{os.getpid()}-")
    assert (target / "sub" / "a").read_text() == "x"
    assert sorted(entry.name for entry in target.iterdir()) == ["sub"]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit, OutputError, MemoryError])
def test_any_exception_leaves_nothing(tmp_path: Path, source: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        fill_and_raise(kind, tmp_path / "out", source)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_a_relative_target_lands_where_the_run_began(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with stage(Path("out"), source) as folder:
        (folder / "a").touch()
        monkeypatch.chdir("/")
    assert (tmp_path / "out" / "a").exists()


def test_an_existing_model_needs_force(tmp_path: Path, source: Path) -> None:
    target = old_model(tmp_path / "out")
    with pytest.raises(OutputError, match="--force"), stage(target, source):
        pytest.fail("entered")
    assert (target / "config.json").read_text() == "old"

    with stage(target, source, force=True) as folder:
        (folder / "config.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert (target / "config.json").read_text() == "new"
    assert hidden(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_model(tmp_path: Path, source: Path) -> None:
    target = old_model(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        fill_and_raise(ZeroDivisionError, target, source, force=True)
    assert (target / "config.json").read_text() == "old"


def test_if_the_new_folder_cannot_be_renamed_in_the_old_one_comes_back(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_model(tmp_path / "out")
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if ".tmp-" in Path(old).name:
            raise OSError(errno.EIO, "disk trouble")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match="input/output"), stage(target, source, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_model_folder_is_never_replaced(tmp_path: Path, source: Path, force: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    old_model(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "dangling").symlink_to("gone")
    for name in ("home", "file", "link", "dangling"):
        with pytest.raises(OutputError, match=name), stage(tmp_path / name, source, force=force):
            pytest.fail("entered")
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_empty_folder_may_be_replaced_with_force(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    with stage(tmp_path / "out", source, force=True) as folder:
        (folder / "a").touch()
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("source", "the source itself"),
        ("source/", "the source itself"),
        ("other/../source", "the source itself"),
        ("link", "the source itself"),
        ("source/out", "inside the source"),
        ("link/out", "inside the source"),
        ("", "holds the source"),
        ("..", "holds the source"),
    ],
)
def test_the_source_is_never_touched(tmp_path: Path, source: Path, target: str, says: str, force: bool) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("source")
    before = sorted(source.iterdir())
    with pytest.raises(OutputError, match=says), stage(tmp_path / target, source, force=force):
        pytest.fail("entered")
    assert sorted(source.iterdir()) == before


def test_a_missing_parent(tmp_path: Path, source: Path) -> None:
    with stage(tmp_path / "a" / "b" / "c", source) as folder:
        (folder / "x").touch()
    assert (tmp_path / "a" / "b" / "c" / "x").exists()
    with pytest.raises(ValueError, match="no"), stage(tmp_path / "d" / "e" / "f", source):
        raise ValueError("no")
    assert not (tmp_path / "d").exists()
    with pytest.raises(OutputError, match="is not a folder"):
        check_output(source / "config.json" / "x", force=False, source=tmp_path / "elsewhere", needed_bytes=0)


def test_an_unwritable_parent(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, whom no permission stops
    with pytest.raises(OutputError, match="no permission"), stage(tmp_path / "out", source):
        pytest.fail("entered")


def test_too_little_space_is_known_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(OutputError, match=r"1,000 bytes are needed, 999 are free"):
        check_output(tmp_path / "out", force=False, source=source, needed_bytes=1000)
    with stage(tmp_path / "out", source, needed_bytes=999):
        pass


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "input/output"),
    ],
)
def test_what_the_disk_refuses_is_said_plainly(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    checkpoint = Checkpoint.open(source)

    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    for name in ("copy_file_range", "sendfile", "write"):
        monkeypatch.setattr(os, name, full)
    with pytest.raises(OutputError, match=says) as caught, stage(tmp_path / "out", source) as folder:
        write_shard(folder / "x", [TargetTensor.copy_of(info) for info in checkpoint.tensors.values()], {})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_a_source_file_that_may_not_be_read_is_not_blamed_on_the_target(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"), stage(tmp_path / "out", source):
        raise PermissionError(errno.EACCES, "Permission denied", str(source / "tokenizer.json"))


def test_other_faults_are_not_dressed_up(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConnectionResetError), stage(tmp_path / "out", source):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_a_really_full_disk(tmp_path: Path, source: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        big = TargetTensor(key="x", dtype="F32", shape=(1 << 20,), produce=lambda: torch.zeros(1 << 20))
        with pytest.raises(OutputError, match="disk is full"), stage(disk / "out", source) as folder:
            write_shard(folder / "x", [big], {})
        with pytest.raises(OutputError, match="disk is full"), stage(disk / "out", source) as folder:
            (folder / "x").write_bytes(bytes(1 << 20))
        with pytest.raises(OutputError, match="bytes are needed"), stage(disk / "out", source, needed_bytes=1 << 20):
            pytest.fail("entered")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


HOLD = """
import sys, time
from pathlib import Path
from gqa_convert.checkpoint.staging import staged_output
with staged_output(Path(sys.argv[1]), force=True, source=Path(sys.argv[2]), needed_bytes=0) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def start(target: Path, source: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target), str(source)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_run_left_is_cleared_and_what_a_live_one_fills_is_not(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    killed, live = start(target, source), start(target, source)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not target.exists()
        assert len(hidden(tmp_path)) == 2

        with stage(target, source) as folder:
            (folder / "a").touch()

        (left,) = hidden(tmp_path)
        assert f"-{live.pid}-" in left
        assert (target / "a").exists()
        assert (tmp_path / left / "model.safetensors").read_bytes() == b"half"
    finally:
        live.kill()
        live.wait()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_reused_process_number_does_not_protect_what_is_stale(tmp_path: Path, source: Path) -> None:
    stale = tmp_path / f".out.tmp-{os.getpid()}-00000000"
    stale.mkdir()
    (stale / ".lock").touch()
    with stage(tmp_path / "out", source):
        assert not stale.exists()


def test_only_leftovers_of_the_same_target_are_cleared(tmp_path: Path, source: Path) -> None:
    pid = dead_pid()
    mine = tmp_path / f".out.tmp-{pid}-00000000"  # killed before it made its lock
    others = [
        tmp_path / f".out2.tmp-{pid}-00000000",
        tmp_path / ".out.tmp-notes",
        tmp_path / ".outx",
        tmp_path / f".out.tmp-{os.getpid()}-00000000",  # another thread, before it makes its lock
    ]
    for folder in (mine, *others):
        folder.mkdir()
    with stage(tmp_path / "out", source):
        pass
    assert not mine.exists()
    assert all(folder.exists() for folder in others)


def test_an_old_model_that_a_killed_run_had_moved_aside_comes_back(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    old_model(tmp_path / f".out.old-{dead_pid()}-00000000")
    with pytest.raises(OutputError, match="--force"), stage(target, source):
        pytest.fail("entered")
    assert (target / "config.json").read_text() == "old"


def test_an_old_model_that_was_replaced_is_cleared(tmp_path: Path, source: Path) -> None:
    aside = old_model(tmp_path / f".out.old-{dead_pid()}-00000000")
    target = old_model(tmp_path / "out", "new")
    with pytest.raises(OutputError, match="--force"), stage(target, source):
        pytest.fail("entered")
    assert not aside.exists()
    assert (target / "config.json").read_text() == "new"


def test_two_runs_to_one_target_do_not_mix(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with stage(target, source) as first:
            (first / "config.json").write_text("first")
            with stage(target, source) as second:
                (second / "config.json").write_text("second")

    with pytest.raises(OutputError, match="exists"):
        race()
    assert (target / "config.json").read_text() == "second"
    assert hidden(tmp_path) == []


def test_what_only_looks_like_a_leftover_is_not_removed(tmp_path: Path, source: Path) -> None:
    """Somebody's own folder under such a name: no record of ours, so it stays."""
    mine = tmp_path / f".out.old-{dead_pid()}-00000000"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    link = tmp_path / f".out.tmp-{dead_pid()}-00000000"
    link.symlink_to(source)
    old_model(tmp_path / "out")
    with stage(tmp_path / "out", source, force=True):
        pass
    assert (mine / "thesis.tex").exists()
    assert (source / "config.json").exists()
    assert link.is_symlink()


RACE = """
import sys
from pathlib import Path
from gqa_convert.checkpoint.provenance import PROVENANCE, write_provenance
from gqa_convert.checkpoint.staging import staged_output
for number in range(15):
    with staged_output(Path(sys.argv[1]), force=True, source=Path(sys.argv[2]), needed_bytes=0, sync=False) as folder:
        (folder / "config.json").write_text(f"{sys.argv[3]} {number}")
        write_provenance(folder / PROVENANCE, {"conversion": {}})
"""


def test_runs_that_replace_one_output_at_once_do_not_hurt_each_other(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    arguments = [sys.executable, "-c", RACE, str(target), str(source)]
    runs = [subprocess.Popen([*arguments, str(n)], stderr=subprocess.PIPE, text=True) for n in range(4)]
    for run in runs:
        _, said = run.communicate()
        assert (run.returncode, said) == (0, "")
    check_replaceable(target)
    assert hidden(tmp_path) == []
    assert sorted(entry.name for entry in target.iterdir()) == ["config.json", "gqa_convert.json"]


def test_an_output_that_is_changed_while_the_new_one_is_written_is_kept(tmp_path: Path, source: Path) -> None:
    target = old_model(tmp_path / "out")

    def replace() -> None:
        with stage(target, source, force=True) as folder:
            (folder / "config.json").write_text("new")
            (target / "notes.txt").write_text("x")

    with pytest.raises(OutputError, match=r"notes\.txt"):
        replace()
    assert (target / "config.json").read_text() == "old"
    assert (target / "notes.txt").exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("length", [240, 255])
def test_a_long_name_is_taken_whole(tmp_path: Path, source: Path, length: int) -> None:
    target = tmp_path / ("x" * length)
    for force in (False, True):
        with stage(target, source, force=force) as folder:
            write_provenance(folder / PROVENANCE, {"conversion": {}})
    assert (target / PROVENANCE).exists()
    assert hidden(tmp_path) == []


def test_names_beyond_what_file_systems_take(tmp_path: Path, source: Path) -> None:
    for target in (tmp_path / ("x" * 256), tmp_path / ("é" * 200), tmp_path.joinpath(*["y" * 200] * 30)):
        with pytest.raises(OutputError, match="long"), stage(target, source):
            pytest.fail("entered")


def test_a_circle_of_links(tmp_path: Path, source: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for target in (tmp_path / "a", tmp_path / "a" / "out"):
        with pytest.raises(OutputError, match="a"), stage(target, source, force=True):
            pytest.fail("entered")


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.ESTALE, errno.EIO, errno.ENOTEMPTY, errno.EPERM])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_rename_that_fails_loses_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int, replacing: bool
) -> None:
    target = tmp_path / "out"
    if replacing:
        old_model(target)

    def failing(old: Path, new: Path) -> None:
        raise OSError(code, os.strerror(code), str(old), None, str(new))

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError) as caught, stage(target, source, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert "\n" not in str(caught.value)
    assert hidden(tmp_path) == []
    assert target.exists() == replacing
    if replacing:
        assert (target / "config.json").read_text() == "old"


def test_a_stage_that_somebody_removes(tmp_path: Path, source: Path) -> None:
    def fill() -> None:
        with stage(tmp_path / "out", source) as folder:
            shutil.rmtree(folder)
            (folder / "config.json").write_text("x")

    with pytest.raises(OutputError, match="cannot be written"):
        fill()


def test_killed_while_writing_never_leaves_a_target(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out"
    for _ in range(3):
        process = start(target, source)
        time.sleep(0.01)
        process.kill()
        process.wait()
        assert not target.exists()
    with stage(target, source) as folder:
        (folder / "a").touch()
    assert (target / "a").exists()
    assert hidden(tmp_path) == []
