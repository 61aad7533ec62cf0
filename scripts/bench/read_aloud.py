#!/usr/bin/env python3
"""Read a text aloud, as sound to calibrate on: many voices, speeds, pitches and loudnesses, some with noise.

    python scripts/bench/read_aloud.py TEXT.jsonl SOUND --minutes 40 --prompts /usr/share/asterisk/sounds

Needs `espeak-ng`, takes `flite` too where that is installed (`apt-get install espeak-ng flite`). Recordings of 8 to 28
seconds are written as .wav files of 16,000 samples a second. `--prompts` is a folder of short recordings of people,
such as those of a telephone exchange (`apt-get install asterisk-core-sounds-en-g722 ffmpeg`): one of every five that
are written is some of them strung together.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
RATE = 16000
SHORTEST, LONGEST = 8, 28  # seconds of a recording
ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
SPEAKERS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5", "steph", "linda", "Andy", "Annie")
FLITE = ("slt", "rms", "awb", "kal16")
STORIES = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]{40,300}[.?!]")  # sentences that can be read; no code, no marks


def main() -> None:
    """Write recordings until there are enough minutes of them."""
    args = parse_arguments()
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted, made, number = args.minutes * 60.0, 0.0, 0
    read = sentences(args.text)
    prompts = sorted(file for file in args.prompts.rglob("*") if file.is_file()) if args.prompts else []
    while made < wanted:
        seconds = rng.uniform(SHORTEST, LONGEST)
        if prompts and number % 5 == 4:
            voice, sound = "prompts", string(prompts, seconds, rng)
        else:
            voice, sound = spoken(read, seconds, rng)
        sound = recorded(sound[: LONGEST * RATE], rng)
        write(args.out / f"{number:04d}-{voice}.wav", sound)
        made, number = made + len(sound) / RATE, number + 1
    print(f"{number} recordings, {made / 60:.1f} minutes")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="JSON lines with `text`")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--prompts", type=Path, help="folder of short recordings in any format that ffmpeg reads")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def sentences(text: Path) -> list[list[str]]:
    """Sentences of each document, in order; documents with few are left out."""
    documents = [
        [
            re.sub(r"\s+([,;:.?!)])", r"\1", found)
            for found in STORIES.findall(json.loads(line)["text"].replace("\n", " "))
        ]
        for line in text.read_text().splitlines()
    ]
    return [document for document in documents if len(document) > 5]


def spoken(read: list[list[str]], seconds: float, rng: random.Random) -> tuple[str, Samples]:
    """Sentences of one document that last about `seconds`, by a voice that is drawn: its name, (samples,)."""
    document = rng.choice(read)
    words_a_minute = rng.randint(120, 200)
    budget, start, said = seconds * words_a_minute / 60, rng.randrange(len(document) - 3), ""
    while start < len(document) and (not said or len(said.split()) + len(document[start].split()) < budget):
        said, start = f"{said} {document[start]}", start + 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.wav"
        if shutil.which("flite") and rng.random() < 0.5:
            voice = rng.choice(FLITE)
            choices = ["--setf", f"duration_stretch={160 / words_a_minute:.2f}"]
            command = ["flite", "-voice", voice, *choices, "-t", said, "-o", str(file)]
        else:
            voice = f"{rng.choice(ACCENTS)}+{rng.choice(SPEAKERS)}"
            choices = ["-s", str(words_a_minute), "-p", str(rng.randint(25, 75))]
            command = ["espeak-ng", "-v", voice, *choices, "-w", str(file), said]
        subprocess.run(command, check=True, capture_output=True)
        return voice, opened(file)


def string(files: list[Path], seconds: float, rng: random.Random) -> Samples:
    """Recordings drawn and joined until they last `seconds`, half a second between them."""
    parts: list[Samples] = []
    while sum(map(len, parts)) < seconds * RATE:
        to_raw = f"-f s16le -ac 1 -ar {RATE} -"
        command = ["ffmpeg", "-v", "error", "-i", str(rng.choice(files)), *to_raw.split()]
        raw = subprocess.run(command, check=True, capture_output=True).stdout
        sound = (np.frombuffer(raw, np.int16) / 2**15).astype(np.float32)
        if len(sound) > RATE // 2:
            parts += [sound, np.zeros(RATE // 2, np.float32)]
    return np.concatenate(parts)


def recorded(sound: Samples, rng: random.Random) -> Samples:
    """The sound at a loudness that is drawn, every other with white noise 20 to 45 dB below it."""
    sound = sound / max(float(np.abs(sound).max()), 1e-3) * rng.uniform(0.1, 0.95)
    if rng.random() < 0.5:
        level = float(np.sqrt((sound**2).mean())) * 10 ** (-rng.uniform(20, 45) / 20)
        sound = sound + level * np.random.default_rng(rng.getrandbits(32)).standard_normal(len(sound), np.float32)
    return sound.clip(-1, 1)


def opened(file: Path) -> Samples:
    """A .wav file at `RATE`, (samples,)."""
    from gqa_convert.data.sound import sounds

    sound: Samples = next(iter(sounds(str(file), rate=RATE)))
    return sound


def write(file: Path, sound: Samples) -> None:
    """Write (samples,) as 16-bit PCM."""
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((sound * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
