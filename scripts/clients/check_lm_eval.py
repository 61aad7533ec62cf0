"""Client check: the log-likelihoods of lm-eval, token by token."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import main
from lm_eval.models.huggingface import HFLM


def log_probabilities_of(folder: Path, ids: list[int]) -> Any:
    """Log-probabilities of a few tokens at every position; the rest is NaN, for lm-eval gives one number a request."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", trust_remote_code=True, batch_size=1)
    vocabulary = int(model.model.config.vocab_size)
    requests, places = [], []
    for position in range(len(ids)):
        for token in {*range(3 + position, vocabulary, vocabulary // 4), ids[(position + 1) % len(ids)]}:
            requests.append((("", ""), ids[: position + 1], [token]))
            places.append((position, token))
    log_probabilities = np.full((len(ids), vocabulary), np.nan)
    for (position, token), (value, _) in zip(
        places, model._loglikelihood_tokens(requests, disable_tqdm=True), strict=True
    ):
        log_probabilities[position, token] = value
    return log_probabilities


if __name__ == "__main__":
    main(log_probabilities_of, lambda: f"lm-eval {version('lm-eval')}", logits=False)
