"""A loaded model in the benchmark, and what is known of it before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gqa_convert.evaluate import models
from gqa_convert.evaluate.decode import weights
from gqa_convert.evaluate.decode.caches import cross_bytes_per_token


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A loaded model in the benchmark; the first one is the base."""

    name: str
    query_heads: int
    kv_heads: int
    kv_heads_per_layer: tuple[int, ...] = ()
    model: Any

    @property
    def has_encoder(self) -> bool:
        """Whether its decoder reads an encoder's output."""
        return models.has_encoder(self.model)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all its weights."""
        return weights.weight_bytes(self.model)

    @cached_property
    def weight_bytes_read(self) -> int:
        """Bytes of weights that decoding one token reads."""
        return weights.bytes_read_per_step(self.model)

    @cached_property
    def _bytes_per_token(self) -> tuple[int, int]:
        cross = cross_bytes_per_token(self.model)  # first, for its refusal of what does not run says why
        return models.cache_bytes_per_token(self.model), cross

    def sequence_bytes(self, context: int, source: int | None) -> int:
        """Bytes that the caches of one sequence take, from those per token as measured.

        Raises:
            UnsupportedModelError: if its cache is not keys and values.
        """
        own, cross = self._bytes_per_token
        return own * context + cross * (source or 0)

    def too_long(self, tokens: int, source: int | None) -> str:
        """Say that it has learnt fewer positions than these; empty if it has not."""
        limit = weights.position_limit(self.model.get_decoder())
        if limit is not None and limit < tokens:
            return f"{self.name} has {limit} positions"
        limit = None if source is None else weights.position_limit(self.model.get_encoder())
        if limit is not None and source is not None and limit < source:
            return f"the encoder of {self.name} has {limit} positions"
        return ""


def load_contenders(
    folders: Sequence[str | Path], *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> list[Contender]:
    """Load every folder or hub id into memory, the base first.

    Raises:
        GQAConvertError: if one cannot be loaded.
    """
    contenders = []
    for folder in folders:
        subject = models.subject(str(folder), trust_remote_code=trust_remote_code)
        model = models.load(subject, dtype=dtype, device=device)
        contenders.append(
            Contender(
                name=subject.name,
                query_heads=subject.query_heads,
                kv_heads=subject.kv_heads,
                kv_heads_per_layer=subject.per_layer,
                model=model,
            )
        )
    return contenders
