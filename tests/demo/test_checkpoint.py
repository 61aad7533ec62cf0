"""The committed checkpoint: small, whole, and as good as its record says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gqa_convert.checkpoint.embedded import CHECKPOINT
from gqa_convert.demo.loss import held_out_loss
from gqa_convert.demo.run import held_out_windows
from tests.support import load_with_info

SAMPLES = [
    "def add(a, b):\n    return a + b\n",
    "\tx = {'k': [1, 2.5e-3, 0xFF]}  # spaced   out\r\n",
    "naïve café, 日本語, 🙂",
    "if not isinstance(value, (int, str)) : raise TypeError( 'no' ) .",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    training: dict[str, Any] = json.loads((CHECKPOINT / "training.json").read_text())
    return training


@pytest.mark.parametrize("text", SAMPLES)
def test_tokenizer_returns_the_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_one_mark_for_beginning_and_end(tokenizer: Any) -> None:
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert len(tokenizer("return x")["input_ids"]) < len("return x")


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8_000_000


def test_loads_with_no_key_left_over(record: dict[str, Any]) -> None:
    model, info = load_with_info(CHECKPOINT)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.config.num_attention_heads == model.config.num_key_value_heads == 8
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_config_has_both_spellings() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


def test_record_says_how_it_was_made(record: dict[str, Any]) -> None:
    assert record["command"].startswith("python scripts/make_demo_checkpoint.py")
    assert {"seed", "steps", "tokens", "python", "torch", "transformers", "train_modules", "held_out_modules"} <= set(
        record
    )


def test_loss_is_the_recorded_one(tokenizer: Any, record: dict[str, Any]) -> None:
    """Loose, because the text is that of this machine's Python."""
    ids_BT, _ = held_out_windows(tokenizer, length=record["window_tokens"])
    assert held_out_loss(CHECKPOINT, ids_BT) == pytest.approx(record["held_out_loss_nats_per_token"], abs=0.3)
