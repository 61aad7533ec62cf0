"""What a run reads: single documents as the model gets them, and which of their tokens are learnt."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.data.conversations import TOKEN, UNSCORED, Conversation
from gqa_convert.data.documents import open_corpus
from gqa_convert.errors import UsageError
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.corpus import run_encoder, source_spec


@dataclass(frozen=True, kw_only=True)
class ShownDocument:
    """A document as tokens.

    Attributes:
        source: name of its source.
        row: its number there, from 0.
        kind: `conversation` or `text`.
        way: how the learnt part of a conversation is told; empty for text.
        ids: the tokens.
        tokens: how the tokenizer spells them.
        learnt: for each whether it is predicted in training.
    """

    source: str
    row: int
    kind: str
    way: str
    ids: list[int]
    tokens: list[str]
    learnt: list[bool]

    @property
    def stretches(self) -> list[tuple[bool, list[str]]]:
        """Neighbouring tokens that are learnt, or not, together."""
        parts: list[tuple[bool, list[str]]] = []
        for token, learnt in zip(self.tokens, self.learnt, strict=True):
            if not parts or parts[-1][0] != learnt:
                parts.append((learnt, []))
            parts[-1][1].append(token)
        return parts


def show_documents(config: UptrainConfig, *, row: int = 0) -> list[ShownDocument]:
    """Document number `row` of every source of a run, as the model gets it.

    Raises:
        UsageError: if a source has fewer, or its conversations cannot be made tokens.
        GQAConvertError: if the model folder or a source cannot be read.
    """
    source = Source.open(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    tokenizer = source.tokenizer()
    encoder = run_encoder(config, tokenizer, source.config)
    pairs = config.objective.kind == "text_to_text"
    shown = []
    for name, section, _ in config.data.named:
        document = next(islice(open_corpus(source_spec(section)).all_documents(), row, None), None)
        if document is None:
            raise UsageError(f"--row {row}: {name} has fewer documents.")
        talks = isinstance(document, Conversation)
        ids = encoder.encode([document])[0]
        shown.append(
            ShownDocument(
                source=name,
                row=row,
                kind="conversation" if talks else "text",
                way=encoder.template.way if talks and not pairs and config.data.loss_on == "assistant" else "",
                ids=(ids & TOKEN).tolist(),
                tokens=[_spelled(tokenizer, int(token)) for token in ids & TOKEN],
                learnt=((ids & UNSCORED) == 0).tolist(),
            )
        )
    return shown


def _spelled(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False))


def data_rows(config: UptrainConfig) -> list[tuple[str, str]]:
    """What a plan says of the data beyond its settings: conversations, and how much of the first one is learnt."""
    local = all(section.kind != "hub" for _, section, _ in config.data.named)
    if not local:
        return []
    rows = []
    for shown in show_documents(config):
        if shown.kind == "conversation":
            how = f", told by {shown.way}" if shown.way else ""
            rows.append(
                (
                    "learns" if len(config.data.named) == 1 else f"learns of {shown.source}",
                    f"{config.data.loss_on} ({sum(shown.learnt)} of the first conversation's {len(shown.ids)} tokens"
                    f"{how}; `gqa uptrain show-data` shows them)",
                )
            )
    return rows
