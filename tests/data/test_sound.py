"""Sound as it is read: from files of every width, folders, and hub datasets whose decoder is not installed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gqa_convert.data import sound
from gqa_convert.data.sound import resampled, sounds
from gqa_convert.errors import HubError, UsageError
from tests.listening import write_wave


def tone(hertz: float, rate: int, seconds: float = 1.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_of_every_width(tmp_path: Path, width: int) -> None:
    wanted = tone(300, 8000)
    (seen,) = sounds(str(write_wave(tmp_path / "a.wav", wanted, rate=8000, width=width)), rate=8000)
    assert seen.dtype == np.float32
    assert np.abs(seen - wanted).max() < 2.0 ** (2 - 8 * width) + 1e-6


def test_channels_become_one(tmp_path: Path) -> None:
    both = np.stack([tone(300, 8000), -tone(300, 8000) / 2], axis=1)
    (seen,) = sounds(str(write_wave(tmp_path / "a.wav", both, rate=8000)), rate=8000)
    assert np.abs(seen - both.mean(1)).max() < 1e-4


@pytest.mark.parametrize(("rate", "wanted"), [(48000, 16000), (24000, 16000), (44100, 16000), (8000, 16000)])
def test_another_rate_keeps_the_tone(rate: int, wanted: int) -> None:
    seen = resampled(tone(440, rate), rate, wanted)
    assert len(seen) == wanted
    middle = slice(wanted // 10, -wanted // 10)
    assert np.abs(seen[middle] - tone(440, wanted)[middle]).max() < 2e-3


def test_another_rate_leaves_out_what_it_cannot_hold() -> None:
    assert np.abs(resampled(tone(12000, 48000), 48000, 16000)[1600:-1600]).max() < 2e-3


def test_a_folder_is_read_in_an_order_drawn_from_the_seed(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        write_wave(tmp_path / f"{i % 2}" / f"{i}.WAV", np.full(100, i / 10), rate=8000)
    (tmp_path / "words.txt").write_text("not sound")

    def order(seed: int) -> list[float]:
        return [round(float(x[0]), 2) for x in sounds(str(tmp_path), rate=8000, seed=seed)]

    assert sorted(order(0)) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.wav", b"RIFF", "cannot be read as sound"),
        ("a.flac", b"fLaC", "cannot be read as sound"),
        ("a.txt", b"words", "is not a sound file by its name"),
    ],
)
def test_what_is_no_sound(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        list(sounds(str(tmp_path / name), rate=8000))


@pytest.mark.parametrize("name", ["", "missing.wav", "./missing", "a/b/c"])
def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no such file|cannot be a path"):
        sounds(name, rate=8000)


def test_a_folder_without_sound(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no sound"):
        sounds(str(tmp_path), rate=8000)


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, columns: dict[str, Any], *, audio: str = "") -> None:
    """Serve columns as a hub dataset is: a parquet file whose features say which column is sound."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    kinds = {name: datasets.Audio() if name == audio else datasets.Value("string") for name in columns}
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(folder / "rows.parquet"),
        split="train",
        streaming=True,
        features=datasets.Features(kinds),
        cache_dir=str(folder / "cache"),
    )
    monkeypatch.setattr(sound, "hub_rows", lambda spec, **_: rows)


def test_a_hub_dataset_gives_its_audio_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_wave(tmp_path / f"{i}.wav", tone(200 + 100 * i, 8000), rate=8000) for i in range(3)]
    cells: list[dict[str, Any]] = [{"bytes": file.read_bytes(), "path": "x.wav"} for file in files[:2]]
    cells.append({"bytes": None, "path": str(files[2])})
    hub(monkeypatch, tmp_path, {"text": ["a", "b", "c"], "speech": cells}, audio="speech")
    seen = sorted(sounds("owner/name:clean:test", rate=8000), key=lambda x: float(np.abs(np.diff(x)).max()))
    assert [len(x) for x in seen] == [8000] * 3
    for i, heard in enumerate(seen):
        assert np.abs(heard - tone(200 + 100 * i, 8000)).max() < 1e-3


def test_a_hub_dataset_without_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, tmp_path, {"text": ["a"]})
    with pytest.raises(UsageError, match=r"none of its columns holds sound \(it has text\)"):
        list(sounds("owner/name", rate=8000))


def test_a_hub_dataset_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, tmp_path, {"speech": [{"bytes": None, "path": "/nowhere/a.wav"}]}, audio="speech")
    with pytest.raises(HubError, match="reading the hub dataset failed"):
        list(sounds("owner/name", rate=8000))


def test_soundfile_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    def read(file: io.BytesIO, **_: Any) -> tuple[NDArray[np.float32], int]:
        assert file.read() == b"fLaC"
        return np.ones((80, 2), np.float32), 8000

    monkeypatch.setitem(sys.modules, "soundfile", types.SimpleNamespace(read=read))  # type: ignore[arg-type]
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    (seen,) = sounds(str(tmp_path / "a.flac"), rate=8000)
    assert seen.tolist() == [1.0] * 80
