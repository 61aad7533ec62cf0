"""Client check: another release of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from common import main
from transformers import AutoModelForCausalLM


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


if __name__ == "__main__":
    main(logits_of, lambda: f"transformers {transformers.__version__}")
