"""A tiny Whisper, saved with its processor, and recordings to play to it."""

from __future__ import annotations

import string
import wave
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray

from gqa_convert.contract.kv_axes import KVAxes
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config


def save_tied_whisper(folder: Path, *, groups: int, positions: int = 1500) -> Path:
    """Save a tiny Whisper of eight heads, tied in `groups` groups, with its processor.

    `positions` are the encoder's: 1,500 are the 30 seconds that every window of sound is padded to.
    """
    grouped, model = (_tiny_whisper(heads, seed, positions) for seed, heads in enumerate((groups, 8)))
    model.load_state_dict(KVAxes(model, grouped, 8, groups).expand(grouped.state_dict()))
    end = 127
    settings = model.generation_config
    settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id = 60, end, end
    settings.no_timestamps_token_id = 61
    model.save_pretrained(folder)
    letters = string.ascii_letters
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {f"<|{i}|>": i for i in range(len(letters), end)} | {"<|endoftext|>": end}
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=model.config.num_mel_bins, chunk_length=positions // 50
    )
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def _tiny_whisper(kv_heads: int, seed: int, positions: int) -> Any:
    config = tiny_config("whisper", num_kv_heads=kv_heads)
    config.max_source_positions = positions
    return tiny_model(config, seed)


def write_wave(path: Path, values: NDArray[Any], *, rate: int = 16000, width: int = 2) -> Path:
    """Write samples between -1 and 1, (samples,) or (samples, channels), as integers of `width` bytes."""
    channels = values.shape[1] if values.ndim == 2 else 1
    whole = np.round(values.astype(np.float64) * (2 ** (8 * width - 1) - 1)).astype("<i8")
    if width == 1:
        whole = whole + 128
    raw = whole.reshape(-1, 1).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return path
