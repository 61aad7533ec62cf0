"""What an evaluation found: plain values that turn into JSON and back. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One model's own figures.

    Attributes:
        name: folder name.
        query_heads: of the decoder.
        kv_heads: of the decoder.
        parameters: tied ones counted once.
        kv_cache_bytes_per_token: measured, in the dtype the model ran in.
        loss: nats per scored token.
        loss_interval: its 95 % bootstrap interval.
        bits_per_byte: loss over the UTF-8 bytes of the scored text.
    """

    name: str
    query_heads: int
    kv_heads: int
    parameters: int
    kv_cache_bytes_per_token: int
    loss: float
    loss_interval: tuple[float, float]
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A converted model against its original; intervals are 95 % bootstrap intervals, paired by window.

    Attributes:
        model: the converted model's own figures.
        loss_difference: nats per token more than the original.
        loss_difference_interval: of the same.
        kl: KL(original || converted), nats per token.
        kl_interval: of the same.
        top1_agreement: share of tokens at which both models rank the same token first.
        top1_interval: of the same.
        seconds: time to score both models.
    """

    model: ModelResult
    loss_difference: float
    loss_difference_interval: tuple[float, float]
    kl: float
    kl_interval: tuple[float, float]
    top1_agreement: float
    top1_interval: tuple[float, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An original, its conversions, and how they were measured.

    Attributes:
        task: `next token`, `span corruption` or `pairs`.
        data: name of the data (no path).
        context: tokens a window.
        stride: tokens from one window to the next.
        windows: windows scored.
        tokens: tokens scored.
        bytes: UTF-8 bytes of text behind them.
        dtype: what the models ran in.
        device: what they ran on.
        settings: everything else a repetition needs.
        versions: of the libraries.
        base: the original's figures.
        converted: one entry a conversion.
        tasks: results of lm-eval by model name, where asked for.
    """

    task: str
    data: str
    context: int
    stride: int
    windows: int
    tokens: int
    bytes: int
    dtype: str
    device: str
    settings: dict[str, Any]
    versions: dict[str, str]
    base: ModelResult
    converted: tuple[Comparison, ...]
    tasks: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON values, with `perplexity` and the ratio of caches beside what they follow from."""
        found: dict[str, Any] = {"format": 1, "kind": "evaluation"} | asdict(self)
        found["base"]["perplexity"] = self.base.perplexity
        for entry, made in zip(found["converted"], self.converted, strict=True):
            entry["model"]["perplexity"] = made.model.perplexity
            entry["cache_ratio"] = made.model.kv_cache_bytes_per_token / self.base.kv_cache_bytes_per_token
        return found
