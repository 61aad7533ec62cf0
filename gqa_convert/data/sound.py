"""Sound named by one word, as text is in `gqa_convert.data.named`: a file, a folder of files, a hub dataset.

What is read comes as one channel at the rate that is asked for.
"""

from __future__ import annotations

import io
import math
import random
import wave
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.documents import SourceSpec, hub_rows
from gqa_convert.data.named import reading, unfit_name
from gqa_convert.errors import HubError, UsageError

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """A recording by its name (a file's, without folder and suffix, or a row's number), and its words if known."""

    name: str
    samples: Samples
    words: str | None = None


SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")
"""Of files that are looked for; all but `.wav` need `soundfile`."""
SOUND_FORMS = "a .wav file (.flac, .ogg, .mp3 with `pip install soundfile`), a folder of those, or a hub dataset with "
SOUND_FORMS += "an audio column, `id[:configuration[:split]]`"
"""For messages and help."""

_ZEROS = 16  # zero crossings of the resampling filter on each side
_SHUFFLE_ROWS = 100  # rows of a streamed dataset that are shuffled at a time: sound is large


def sounds(data: str, *, rate: int, seed: int = 0) -> Iterator[Samples]:
    """Yield the recordings of `data` in an order drawn from `seed`, each once.

    Args:
        data: a file, a folder (every file below it with a suffix of `SOUND_SUFFIXES`) or a hub dataset, whose first
            audio column is read as a stream.
        rate: samples per second of what is yielded.
        seed: for the order.

    Returns:
        One channel each, float32 between -1 and 1, (samples,).

    Raises:
        UsageError: if there is nothing to read, or a file is no sound that can be read here.
        HubError: if a hub dataset cannot be read.
    """
    files = local_files(data)
    if files is None:
        return _hub(data, rate, seed)
    random.Random(seed).shuffle(files)
    return (resampled(*_decoded(file.read_bytes(), str(file)), rate) for file in files)


def recordings(data: str, *, rate: int, field: str = "text") -> Iterator[Recording]:
    """Yield the recordings of `data` in their order, with what is said in them where that is written down.

    Args:
        data: as for `sounds`, of a hub dataset the split `test` unless it names another. The words of a file stand in
            a .txt beside it, of the same name.
        rate: samples per second of what is yielded.
        field: the column of a hub dataset that holds the words.

    Raises:
        UsageError: as `sounds`, and if the words of a file are no UTF-8 text.
        HubError: if a hub dataset cannot be read.
    """
    files = local_files(data)
    if files is None:
        for number, (row, where, words) in zip(count(1), _rows(data, None, field, "test"), strict=False):
            yield Recording(f"row {number}", resampled(*_decoded(row, where), rate), words)
        return
    for file in files:
        yield Recording(file.stem, resampled(*_decoded(file.read_bytes(), str(file)), rate), _words_beside(file))


def _words_beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8") if text.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text}: cannot be read as UTF-8 text ({_line(error)}).") from error


def at_quiet(recording: Samples, *, rate: int, seconds: float) -> list[Samples]:
    """Cut (samples,) into pieces of at most so many seconds, in their second half, where it is quietest."""
    longest, loud = round(seconds * rate), max(1, rate // 5)  # loudness is judged over a fifth of a second
    pieces = []
    while len(recording) > longest:
        energy = np.convolve(recording[longest // 2 : longest].astype(np.float64) ** 2, np.ones(loud), mode="valid")
        cut = longest // 2 + int(energy.argmin()) + loud // 2
        pieces.append(np.ascontiguousarray(recording[:cut]))
        recording = recording[cut:]
    return [*pieces, recording]


def local_files(data: str) -> list[Path] | None:
    """The sound files that `data` names, sorted; None if it must be a hub dataset.

    Raises:
        UsageError: if it is a path that holds no sound.
    """
    problem = unfit_name(data)
    if problem:
        raise UsageError(f"{data[:80]!r}: cannot be a path ({problem}). Give {SOUND_FORMS}.")
    path = Path(data)
    with suppress(RuntimeError):  # the home of a user that is not there
        path = path.expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SOUND_SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"{path}: holds no sound ({', '.join(SOUND_SUFFIXES)}). Give {SOUND_FORMS}.")
        return files
    if path.is_file():
        if path.suffix.lower() not in SOUND_SUFFIXES:
            raise UsageError(f"{path}: is not a sound file by its name. Give {SOUND_FORMS}.")
        return [path]
    if path.suffix.lower() in SOUND_SUFFIXES or data.startswith(("/", ".", "~")) or data.count("/") > 1:
        raise UsageError(f"{data}: no such file or folder. Give {SOUND_FORMS}.")
    return None


def resampled(samples: Samples, rate: int, wanted: int) -> Samples:
    """Bring (samples,) from `rate` samples per second to `wanted` by a windowed sinc, as torchaudio does."""
    if rate == wanted or not len(samples):
        return samples
    import torch

    common = math.gcd(rate, wanted)
    step, phases = rate // common, wanted // common
    cutoff = min(step, phases) * 0.99
    width = math.ceil(_ZEROS * step / cutoff)
    at = torch.arange(-width, width + step, dtype=torch.float64) / step
    times = (torch.arange(0, -phases, -1, dtype=torch.float64)[:, None] / phases + at) * cutoff
    times = times.clamp(-_ZEROS, _ZEROS)
    kernel = torch.sinc(times) * torch.cos(times * math.pi / _ZEROS / 2) ** 2 * (cutoff / step)
    padded = torch.nn.functional.pad(torch.from_numpy(samples), (width, width + step))
    bands = torch.nn.functional.conv1d(padded[None, None], kernel.float()[:, None], stride=step)
    out: Samples = bands[0].T.flatten()[: math.ceil(len(samples) * phases / step)].numpy()
    return out


def _decoded(content: bytes, where: str) -> tuple[Samples, int]:
    """Decode a sound file: by soundfile where that is installed, else PCM in a .wav by the standard library."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: there without its C library
        return _wave(content, where)
    try:
        both, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"{where}: cannot be read as sound ({_line(error)}).") from error
    return np.ascontiguousarray(both.mean(1), dtype=np.float32), int(rate)


def _wave(content: bytes, where: str) -> tuple[Samples, int]:
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError) as error:
        raise UsageError(
            f"{where}: cannot be read as sound ({_line(error) or 'it ends too soon'}). Without `soundfile` only .wav "
            "files of integers can: pip install soundfile, or convert it."
        ) from error
    raw = raw[: len(raw) // (width * channels) * width * channels]
    values: np.ndarray[Any, Any]
    if width == 1:
        values = np.frombuffer(raw, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        values = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32) / float(2 ** (8 * width - 1))
    return np.ascontiguousarray(values.reshape(-1, channels).mean(1), dtype=np.float32), rate


def _hub(data: str, rate: int, seed: int) -> Iterator[Samples]:
    for row, where, _ in _rows(data, seed):
        yield resampled(*_decoded(row, where), rate)


def _rows(
    data: str, seed: int | None, field: str = "", usual_split: str = "train"
) -> Iterator[tuple[bytes, str, str | None]]:
    """The sound of each row of a hub dataset as the bytes of a file, what messages call it, and its words.

    `seed` shuffles the rows; `field` is the column of the words, which may be none.
    """
    name, _, rest = data.partition(":")
    configuration, _, split = rest.partition(":")
    spec = SourceSpec(kind="hub", paths=(name,), config_name=configuration or None, split=split or usual_split)
    try:
        with reading(data):
            rows = hub_rows(spec, waits=())
        column = audio_column(rows, data)
        words = [field] if field and field in (rows.features or {}) else []
        rows = _undecoded(rows, column, words)
        for row in rows if seed is None else rows.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS):
            yield (*_content(row[column], data), str(row[field] or "") if words else None)
    except (UsageError, HubError):
        raise
    except Exception as error:  # datasets lets errors of every library beneath it through
        raise HubError(f"{data}: reading the hub dataset failed ({type(error).__name__}: {_line(error)}).") from error


def audio_column(rows: Any, data: str) -> str:
    """The first column of a dataset that holds sound.

    Raises:
        UsageError: if none does.
    """
    from datasets import Audio

    features = rows.features or {}
    column = next((name for name, kind in features.items() if isinstance(kind, Audio)), None)
    if column is None:
        raise UsageError(f"{data}: none of its columns holds sound (it has {', '.join(features) or 'none named'}).")
    return str(column)


def _undecoded(rows: Any, column: str, others: list[str]) -> Any:
    """The same rows with sound as the bytes of its files, so that datasets' own decoder (torchcodec) is not needed."""
    from datasets import Audio

    return rows.select_columns([column, *others]).cast_column(column, Audio(decode=False))


def _content(cell: Any, data: str) -> tuple[bytes, str]:
    path = cell.get("path") if isinstance(cell, dict) else None
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell["bytes"], f"{data}: {path or 'a row'}"
    if not path:
        raise UsageError(f"{data}: a row has no sound.")
    import fsspec

    with fsspec.open(path, "rb") as file:
        return file.read(), f"{data}: {path}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
