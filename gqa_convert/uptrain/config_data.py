"""The settings that decide what is trained on and for how long, and what all sections have in common."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from gqa_convert.budget.counts import parse_count
from gqa_convert.data.named import source_named, unfit_name
from gqa_convert.errors import UsageError


def _counted(value: Any) -> Any:
    if value is None:
        return None
    try:
        return parse_count(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


Count = Annotated[int, BeforeValidator(_counted)]
"""A number of tokens or steps; may be written 2B, 1.5T, 8k (8,192)."""


def _place(value: str) -> str:
    problem = unfit_name(value)
    if problem:
        raise ValueError(f"cannot be a path: {problem}")
    return value


Place = Annotated[str, AfterValidator(_place)]
"""A file or folder, a glob pattern or a hub id: anything that a file system could take for a name."""

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, and no key is ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class BudgetSection(Section):
    """How long to train. `steps` wins over `tokens`, `tokens` over `alpha`."""

    alpha: Share | None = None
    """Share of the pretraining tokens; 0.05 if nothing else is said, as in the paper."""
    tokens: Count | None = None
    """Tokens to train on."""
    steps: Count | None = None
    """Optimiser steps."""
    pretraining: str | None = None
    """A known model (`gqa budget --list`) whose published pretraining tokens alpha is a share of."""
    pretraining_tokens: Count | None = None
    """Or the number of tokens itself."""
    pretraining_steps: Count | None = None
    """Or steps, of this run's batch."""


class SourceSection(Section):
    """Where documents come from."""

    kind: Literal["text", "jsonl", "parquet", "folder", "hub", "python"]
    """text, jsonl, parquet: files; folder: every file below one; hub: a dataset id; python: `module:function`."""
    paths: Annotated[tuple[Place, ...], Field(min_length=1)]
    """Files and glob patterns, relative to the working directory; or the folder, the id, the function."""
    text_field: str = "text"
    """The column that holds the text, or a conversation's messages; rows without it are looked for `messages`."""
    documents: str = "file"
    """How text files are cut: file, line, paragraph, or the separator between documents (`<|endoftext|>`)."""
    pattern: str = "**/*"
    """Which files of a folder."""
    config_name: str | None = None
    """Configuration of a hub dataset (C4: `en`)."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""


def _named(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return asdict(source_named(value))
    except UsageError as error:
        raise ValueError(str(error)) from error


Source = Annotated[SourceSection, BeforeValidator(_named)]


class WeightedSource(Section):
    """One source of a mixture."""

    source: Source
    """The documents; see `data.source`."""
    weight: Positive = 1.0
    """Its share of the sequences, in proportion to the others' weights."""
    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^/\s]+$")] | None = None
    """What its curve and messages call it; by default the name of the file, folder or dataset."""


class DataSection(Section):
    """What to train on, and how it becomes token blocks."""

    source: Source | None = None
    """The documents; or one word, as for --calibrate: a file, a folder, a hub id `id[:configuration[:split]]`."""
    sources: tuple[WeightedSource, ...] = ()
    """In place of `source`: several, mixed by weight, to exact proportions in every step."""
    context: Annotated[int, Field(ge=2, le=1 << 27)]
    """Tokens per sequence (of the encoder, for span corruption)."""
    streaming: bool = False
    """Tokenise while training (corpora too large to tokenise first); else once, into `<output>/tokens` or `cache`."""
    streams: Annotated[int, Field(ge=1)] | None = None
    """When streaming: deal the shards out as so many streams, of which each process opens those of its own rows alone;
    a divisor of train.batch_sequences. null: the largest that there are shards for; 1: every process reads all."""
    cache: Place | None = None
    """Folder for tokenised corpora, shared between runs."""
    processes: Annotated[int, Field(ge=1, le=256)] | None = None
    """That tokenise; null: one a processor, eight at most. Small corpora are tokenised in the run's own."""
    separate_documents: bool | Literal["auto"] = "auto"
    """Restart positions and let no attention cross documents; auto: yes for causal_lm. Proven on the model at start."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Of conversations: learn what the assistant says alone, or every token. Text is always learnt whole."""
    packing: Literal["auto", "cut", "whole"] = "auto"
    """cut: documents end to end, cut every `context` tokens; whole: none is cut that fits, the rest of a sequence is
    padded; auto: whole for conversations, cut for text."""
    special_tokens: bool | Literal["auto"] = "auto"
    """Add what the tokenizer adds by itself (BOS for Llama); auto: yes for causal_lm."""
    append_eos: bool | Literal["auto"] = "auto"
    """End documents with EOS; auto: yes for causal_lm."""
    shuffle: bool = True
    """Permute documents each epoch, and blocks within windows."""
    window: Annotated[int, Field(ge=1, le=1 << 24)] = 1024
    """Blocks that are permuted together (and held in memory when streaming, over all streams)."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the documents kept from training for evaluation, chosen by each document's hash."""
    held_out_by: Literal["auto", "document", "shard"] = "auto"
    """When streaming: hold out documents by hash, for which the corpus is read until there are enough; or the last
    shard, of which no more is read than is evaluated on. auto: shard for hub datasets of 16 shards or more."""
    held_out_source: Source | None = None
    """Evaluate on these documents instead; nothing is then held out of `source`."""

    @property
    def named(self) -> list[tuple[str, SourceSection, float]]:
        """Every source with its name (no two alike) and weight."""
        if self.source is not None:
            return [(_short_name(self.source), self.source, 1.0)]
        named: list[tuple[str, SourceSection, float]] = []
        for entry in self.sources:
            name = entry.name or _short_name(entry.source)
            taken = {other for other, _, _ in named}
            numbered = (name if number == 1 else f"{name}-{number}" for number in count(1))
            named.append((next(free for free in numbered if free not in taken), entry.source, entry.weight))
        return named


def _short_name(source: SourceSection) -> str:
    """The last part of where a source lies, without suffix."""
    last = source.paths[0].rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return re.sub(r"\s+", "-", last.split(".")[0] or last)
