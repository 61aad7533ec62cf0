"""Converted Whispers generate as the original does: from prompts, and in transformers' speech pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gqa_convert import convert
from tests import listening


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Whisper whose heads are tied, with its processor, and its conversion, which is the same function."""
    root = tmp_path_factory.mktemp("whisper")
    listening.save_tied_whisper(root / "source", groups=2)
    convert(root / "source", groups=2, out=root / "converted")
    return root / "source", root / "converted"


@pytest.mark.parametrize("given", [{}, {"prompt_ids": [9, 10, 11]}, {"decoder_input_ids": [[9, 5, 11]]}], ids=str)
def test_generation_starts_with_what_is_given(folders: tuple[Path, Path], given: dict[str, Any]) -> None:
    sound = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    generated = []
    for folder in folders:
        model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
        choices = {name: torch.tensor(ids) for name, ids in given.items()}
        generated.append(model.generate(sound, max_new_tokens=8, do_sample=False, **choices).tolist())
    assert generated[0] == generated[1]
    assert len(set(generated[0][0])) > 1


def test_the_speech_pipeline_must_be_told(folders: tuple[Path, Path]) -> None:
    sound = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    texts = []
    for folder in folders:
        pipe: Any = transformers.pipeline("automatic-speech-recognition", model=str(folder), trust_remote_code=True)
        assert type(pipe.feature_extractor).__name__ == "WhisperFeatureExtractor"
        pipe.type = "seq2seq_whisper"
        texts.append(pipe(sound.copy(), generate_kwargs={"max_new_tokens": 5})["text"])
    assert texts[0] == texts[1] != ""
