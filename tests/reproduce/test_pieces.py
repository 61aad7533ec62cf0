from pathlib import Path
from typing import Any

import pytest


def test_a_piece_is_made_once_and_found_again(tmp_path: Path) -> None:
    from pieces import Pieces

    folders = []

    def make(folder: Path) -> dict[str, int]:
        folders.append(folder)
        return {"n": len(folders)}

    told: list[str] = []
    pieces = Pieces(tmp_path, told.append)
    first = pieces.get("arm", {"a": 1}, make)
    assert Pieces(tmp_path).get("arm", {"a": 1}, make) == first
    other = pieces.get("arm", {"a": 2}, make)
    assert (first.result, other.result) == ({"n": 1}, {"n": 2})
    assert first.key != other.key
    assert len(told) == len(folders) == 2


def test_the_processors_time_is_kept_and_summed_by_name(tmp_path: Path) -> None:
    import time

    from pieces import Pieces

    def work(folder: Path) -> dict[str, Any]:
        started = time.process_time()
        while time.process_time() - started < 0.05:
            pass
        return {}

    for name in ("t5-0-a", "t5-0-b", "t5-1-a"):
        Pieces(tmp_path).get(name, {}, work)
    pieces = Pieces(tmp_path, finished_only=True)
    for name in ("t5-0-a", "t5-0-b", "t5-1-a"):
        pieces.get(name, {}, work)
    first, every = pieces.processor_seconds("t5-0-"), pieces.processor_seconds("t5-")
    assert 0.1 <= first < every
    folder = pieces.get("t5-1-a", {}, work).folder
    (folder / "result.json").write_text('{"result": {}}')  # of a time when it was not kept
    pieces.get("t5-1-a", {}, work)
    assert pieces.processor_seconds("t5-") is None
    assert pieces.processor_seconds("t5-0-") == first


def test_an_interrupted_piece_gets_its_folder_again(tmp_path: Path) -> None:
    from pieces import Pieces

    def interrupted(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pieces(tmp_path).get("arm", {"a": 1}, interrupted)
    again = Pieces(tmp_path).get("arm", {"a": 1}, lambda folder: {"half": (folder / "half").read_text()})
    assert again.result == {"half": "done"}


def test_other_versions_are_other_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import pieces

    before = pieces.settings_hash({"a": 1})
    assert pieces.settings_hash({"a": 1}) == before
    monkeypatch.setattr(pieces, "versions", lambda: {"torch": "0"})
    assert pieces.settings_hash({"a": 1}) != before


def test_a_report_begins_no_piece(tmp_path: Path) -> None:
    from pieces import Pieces, Unfinished

    Pieces(tmp_path).get("arm", {"a": 1}, lambda _: {"n": 1})
    finished = Pieces(tmp_path, finished_only=True)
    assert finished.get("arm", {"a": 1}, lambda _: {"n": 2}).result == {"n": 1}
    with pytest.raises(Unfinished):
        finished.get("arm", {"a": 2}, lambda _: {"n": 2})
    assert len(list(tmp_path.iterdir())) == 1
