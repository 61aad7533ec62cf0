"""Calibration tokens: windows of text as the model would meet it.

Shape suffixes: N windows, T tokens a window, S positions of an encoder.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy import transformers_api
from gqa_convert.calibrate.documents import documents
from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    Inputs = Tensor | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]

SEQUENCES = 128
LENGTH = 2048
"""Defaults: 128 windows of 2048 tokens (as Jin et al. 2024, arXiv 2412.20677, calibrate)."""


def window_plan(max_length: int | None, *, sequences: int = SEQUENCES, length: int = LENGTH) -> tuple[int, int]:
    """Return (sequences, length) for a model of `max_length` positions: as many tokens, in shorter windows."""
    if max_length is None or max_length >= length:
        return sequences, length
    return -(-sequences * length // max_length), max_length


def calibration_tokens(
    data: str,
    tokenizer_folder: Path,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Tensor:
    """Return windows of tokens drawn from all over a text source.

    Documents are tokenised as the tokenizer gives them, with its EOS after each (where it has one and did not add it),
    joined and cut.

    Args:
        data: a file, a folder or a hub dataset; see `gqa_convert.calibrate.documents.documents`.
        tokenizer_folder: a folder with the model's tokenizer.
        sequences: windows wanted; a smaller source gives fewer.
        length: tokens a window.
        seed: for the choice of documents.
        trust_remote_code: allow the tokenizer's own code to run.

    Returns:
        ids_NT, int64, 1 <= N <= sequences.

    Raises:
        UsageError: if the source does not fill one window, or the folder has no tokenizer.
        HubError: if a hub dataset cannot be read.
    """
    import torch

    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in documents(data, seed=seed):
        with transformers_api.quiet():
            ids += tokenizer(text)["input_ids"]
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        if len(ids) >= sequences * length:
            break
    whole = min(sequences, len(ids) // length)
    if whole == 0:
        raise UsageError(f"{data}: gives {len(ids)} tokens, less than one window of {length}. Use more text.")
    return torch.tensor(ids[: whole * length], dtype=torch.long).view(whole, length)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint folder's tokenizer.

    Raises:
        UsageError: if it has none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        with transformers_api.quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # every tokenizer library has its own
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"{folder}: no tokenizer could be loaded from it, which text needs ({text}).") from error


def token_hash(inputs: Inputs) -> str:
    """SHA-256 of calibration inputs, for keys of caches."""
    digest = hashlib.sha256()
    for parts in of_one_shape(inputs):
        for name in sorted(parts):
            digest.update(f"{name} {tuple(parts[name].shape)} {parts[name].dtype} ".encode())
            digest.update(parts[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def of_one_shape(inputs: Inputs) -> list[dict[str, Tensor]]:
    """Calibration inputs as arguments by name, a list entry for every shape there is."""
    if isinstance(inputs, Mapping):
        return [dict(inputs)]
    return [dict(parts) for parts in inputs] if isinstance(inputs, Sequence) else [{"input_ids": inputs}]


def batches(inputs: Inputs, size: int | Callable[[Mapping[str, Tensor]], int]) -> list[dict[str, Tensor]]:
    """Cut calibration inputs into the arguments of forward passes over `size` windows each (the last perhaps fewer).

    Where there are several shapes, `size` may be a function of one of them, and their batches are mixed.
    """
    found: list[dict[str, Tensor]] = []
    shapes = of_one_shape(inputs)
    for parts in shapes:
        cut = {name: tensor.split(size(parts) if callable(size) else size) for name, tensor in parts.items()}
        count = len(next(iter(cut.values())))
        found += [{name: pieces[i] for name, pieces in cut.items()} for i in range(count)]
    if len(shapes) > 1:
        random.Random(0).shuffle(found)  # the last are held out of a refit, and should be like the others
    return found
