"""Whisper is calibrated on sound; what cannot be calibrated is refused before anything is run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gqa_convert import convert
from gqa_convert.calibrate import heard
from gqa_convert.calibrate.inputs import calibration_inputs
from gqa_convert.calibrate.parts import streaming_fault
from gqa_convert.calibrate.tokens import token_hash
from gqa_convert.conversion.recipe import Recipe, make_recipe
from gqa_convert.errors import CheckpointError
from gqa_convert.hf.loading import Source
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config
from tests.listening import save_tied_whisper, write_wave
from tests.support import Command

POSITIONS = 100  # two seconds


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tied_whisper(tmp_path_factory.mktemp("whisper") / "source", groups=2, positions=POSITIONS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0)
    for i, seconds in enumerate((5.0, 2.0, 3.2)):
        write_wave(folder / f"{i}.wav", noise.uniform(-0.5, 0.5, round(8000 * seconds)), rate=8000)
    return folder


def recipe(preset: str, clips: Path) -> Recipe:
    return make_recipe(preset, calibrate=str(clips), sequences=8, length=100, refit_steps=12, refit_tokens=64)


def test_windows_are_padded_and_transcribed_by_the_model(whisper: Path, clips: Path, tmp_path: Path) -> None:
    source = Source.open(whisper)
    parts = calibration_inputs(recipe("fast", clips), source, work=tmp_path) or []
    # 5 s and 3.2 s end in pieces of 1 s and 1.2 s: three, one and two windows of two seconds
    assert sum(len(each["input_features"]) for each in parts) == 6
    for each in parts:
        assert each["input_features"].shape[1:] == (80, 2 * POSITIONS)
        assert each["decoder_input_ids"][:, 0].unique().tolist() == [60]  # the start token
    again = calibration_inputs(recipe("fast", clips), source, work=tmp_path) or []
    assert token_hash(again) == token_hash(parts)


def test_transcripts_are_kept_as_they_come(
    whisper: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, write = Source.open(whisper), heard._Writer.write
    monkeypatch.setattr(heard, "_AT_ONCE", 2)  # of six windows
    whole = calibration_inputs(recipe("fast", clips), source, work=tmp_path / "whole") or []
    written: list[int] = []

    def stopped(self: heard._Writer, windows: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(windows))
        return write(self, windows)

    monkeypatch.setattr(heard._Writer, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibration_inputs(recipe("fast", clips), source, work=tmp_path / "stopped")
    written.pop()
    again = calibration_inputs(recipe("fast", clips), source, work=tmp_path / "stopped") or []
    assert written == [2, 2], "the windows that were done are not written again"
    assert token_hash(again) == token_hash(whole)


def test_windows_written_together_say_what_each_says_alone(
    whisper: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source.open(whisper)
    together = calibration_inputs(recipe("fast", clips), source, work=tmp_path / "together") or []
    monkeypatch.setattr(heard, "_AT_ONCE", 1)
    assert token_hash(calibration_inputs(recipe("fast", clips), source, work=tmp_path) or []) == token_hash(together)


def test_fewer_windows_where_fewer_tokens_are_asked_for(whisper: Path, clips: Path, tmp_path: Path) -> None:
    asked = make_recipe("fast", calibrate=str(clips), sequences=2, length=100)
    parts = calibration_inputs(asked, Source.open(whisper), work=tmp_path) or []
    assert sum(len(each["input_features"]) for each in parts) == 2


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_tied_heads_stay_the_same_function(whisper: Path, clips: Path, tmp_path: Path, preset: str) -> None:
    convert(whisper, groups=2, out=tmp_path / "out", recipe=recipe(preset, clips))
    sound = torch.randn(1, 80, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[60, 61, 5, 9, 3]])
    logits = []
    for folder in (whisper, tmp_path / "out"):
        model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(sound, decoder_input_ids=ids).logits)
    assert float((logits[0] - logits[1]).abs().max()) < 1e-3 * float(logits[0].abs().max())


def test_a_whisper_goes_a_layer_at_a_time() -> None:
    config = tiny_config("whisper")
    assert streaming_fault(transformers.WhisperForConditionalGeneration, config) is None


def test_a_dry_run_promises_what_can_be(whisper: Path, clips: Path, command: Command, tmp_path: Path) -> None:
    asked = ("gqa", "convert", whisper, "--groups", 2, "--preset", "fast", "--dry-run", "--out", tmp_path / "out")
    words = tmp_path / "words.txt"
    words.write_text("words")
    for choices, said in (
        ((), "whisper listens. Name a .wav file"),
        (("--calibrate", "self"), "whisper listens. Name a .wav file"),
        (("--calibrate", words), "is not a sound file by its name"),
        (("--calibrate", tmp_path), "holds no sound"),
    ):
        done = command(*asked, *choices)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err
    done = command(*asked, "--calibrate", clips)
    assert done.code == 0
    assert "windows of 2 s" in done.out


def test_without_its_extractor_nothing_is_promised(
    whisper: Path, clips: Path, command: Command, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((whisper / name).read_bytes())
    done = command("gqa", "convert", bare, "--groups", 2, "--preset", "fast", "--calibrate", clips, "--dry-run")
    assert done.code == CheckpointError.exit_code
    assert "no feature extractor" in done.err


@pytest.mark.parametrize(("name", "said"), [("speech_to_text", "it listens"), ("pix2struct", "flattened_patches")])
def test_what_cannot_be_calibrated_is_refused_in_a_dry_run(
    name: str, said: str, command: Command, tmp_path: Path, clips: Path
) -> None:
    tiny_model(tiny_config(name)).save_pretrained(tmp_path / name)
    asked = ("gqa", "convert", tmp_path / name, "--groups", 2, "--preset", "fast", "--calibrate", clips)
    done = command(*asked, "--dry-run")
    assert done.code == 5
    assert said in done.err
    assert "--preset paper" in done.err
    assert command("gqa", "convert", tmp_path / name, "--groups", 2, "--dry-run").code == 0


def test_an_encoder_decoder_of_text_is_told_so_in_a_dry_run(command: Command, tmp_path: Path) -> None:
    tiny_model(tiny_config("t5")).save_pretrained(tmp_path / "t5")
    done = command("gqa", "convert", tmp_path / "t5", "--groups", 2, "--preset", "fast", "--dry-run")
    assert done.code == 2
    assert "cannot write text from nothing" in done.err
