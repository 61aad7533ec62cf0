"""Load checkpoints as the contenders of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gqa_convert.evaluate import models
from gqa_convert.evaluate.decode.contender import Contender


def load_contenders(
    folders: Sequence[str | Path], *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> list[Contender]:
    """Load every folder or hub id into memory, the base first.

    Raises:
        GQAConvertError: if one cannot be loaded.
    """
    found = []
    for folder in folders:
        made = models.subject(str(folder), trust_remote_code=trust_remote_code)
        model = models.load(made, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        found.append(Contender(name=made.name, query_heads=made.query_heads, kv_heads=made.kv_heads, model=model))
    return found
