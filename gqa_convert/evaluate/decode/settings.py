"""What a decode benchmark runs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from gqa_convert.errors import UsageError, check_choice

QUANTISED = ("fp8", "int8", "int4")
"""Formats of keys and values, see `gqa_convert.evaluate.cache_formats`."""
CACHES = ("dynamic", "static", *QUANTISED)
MODES = ("eager", "compile", "graph")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to run.

    Attributes:
        batches: sequences decoded together.
        contexts: tokens in the cache.
        caches: of `CACHES`.
        mode: see `Decoder`.
        steps: tokens decoded per round.
        rounds: timed rounds per point, after one that is not.
        prefill_tokens: leave prefill out where batch x context is more than this; 0: always.
        memory: bytes for which to say how many sequences fit; None: not.
        source_tokens: positions of the encoder's output, for models that have one; None: as many as the context.
        cache_memory: bytes for the cache alone for which to time as many requests as it holds; in an engine only.
    """

    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (512, 2048)
    caches: tuple[str, ...] = ("dynamic", "static")
    mode: str = "eager"
    steps: int = 8
    rounds: int = 7
    prefill_tokens: int = 4096
    memory: int | None = None
    source_tokens: int | None = None
    cache_memory: int | None = None

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.caches if kind not in CACHES]
        if wrong:
            raise UsageError(f"--cache {wrong[0]}: choose from {', '.join(CACHES)}.")
        check_choice("--mode", self.mode, MODES)
        if self.mode != "eager" and self.caches != ("static",):
            raise UsageError(f"--mode {self.mode}: needs --cache static, whose tensors stay where they are.")
        if min((*self.batches, *self.contexts, self.steps, self.rounds, len(self.batches), len(self.contexts))) < 1:
            raise UsageError("--batch, --cache-context, --steps and --rounds must be at least 1.")
        if self.source_tokens is not None and self.source_tokens < 1:
            raise UsageError("--source-tokens must be at least 1.")
