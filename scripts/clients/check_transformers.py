"""Engine check: another release of transformers (4.56 and newer know `dtype`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from common import main, source_ids
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position, with the folder's own code where it has some."""
    source = source_ids(folder)
    auto = AutoModelForCausalLM if source is None else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = torch.tensor([ids])
    inputs = (
        {"input_ids": tokens} if source is None else {"input_ids": torch.tensor([source]), "decoder_input_ids": tokens}
    )
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0].numpy()


if __name__ == "__main__":
    main(logits_of, lambda: f"transformers {transformers.__version__}")
