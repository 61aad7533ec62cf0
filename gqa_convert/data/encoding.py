"""Documents to token ids, in batches (the tokenizers' own threads do the work)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.data.conversations import LOSSES, UNSCORED, ChatTemplate, Conversation
from gqa_convert.errors import UsageError

Ids = NDArray[np.int64]
_BATCH = 256


@dataclass(frozen=True)
class Encoder:
    """Turns texts and conversations into token ids.

    A conversation is what the tokenizer's chat template makes of it, and nothing is added to that. Tokens that are not
    to be predicted have `UNSCORED` added to their id; `TOKEN` masks it off.

    Attributes:
        tokenizer: of transformers.
        special_tokens: add what the tokenizer adds by itself (BOS for Llama, nothing for GPT-NeoX, EOS for T5).
        append_eos: end every document with EOS.
        limit: how many token ids the model knows; None to take any.
        loss_on: of conversations: `assistant`, or `all` tokens.
        pairs: for encoder-decoders, conversations are a text and its answer, of so many tokens together at most: the
            encoder reads the first as it is, without a template, and the second is predicted.

    Raises:
        UsageError: if a conversation meets no template, or one that cannot be followed; if EOS is to be appended and
            there is none; if a text gives an id that the model does not know.
    """

    tokenizer: Any
    special_tokens: bool = True
    append_eos: bool = True
    limit: int | None = None
    loss_on: str = LOSSES[0]
    pairs: int | None = None

    def __post_init__(self) -> None:
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise UsageError("data.append_eos: the tokenizer has no EOS token. Set data.append_eos to false.")

    @cached_property
    def vocabulary(self) -> int:
        """One more than the largest token id, added ones included."""
        return max((*self.tokenizer.get_vocab().values(), len(self.tokenizer) - 1), default=-1) + 1

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template. Raises like the class."""
        return ChatTemplate(self.tokenizer)

    def check_known(self, largest: int | None) -> None:
        """Refuse a token id that the model has no embedding for. Raises like the class."""
        if self.limit is not None and largest is not None and largest >= self.limit:
            raise UsageError(
                f"data: the tokenizer gives token id {largest:,}, the model's vocabulary ends at {self.limit - 1:,}. "
                "Put the original's tokenizer files beside the weights."
            )

    def identity(self) -> dict[str, Any]:
        """What tells two encoders apart, JSON-ready."""
        import hashlib

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        spelled = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        digest = hashlib.blake2b(spelled.encode(), digest_size=16).hexdigest()
        described = {"tokenizer": digest, "special_tokens": self.special_tokens, "append_eos": self.append_eos}
        template = getattr(self.tokenizer, "chat_template", None)
        if self.pairs is not None:
            described |= {"pairs": self.pairs}
        elif template:  # a store of conversations is another one with another template, or another loss
            told = hashlib.blake2b(repr(template).encode(), digest_size=16).hexdigest()
            described |= {"chat_template": told, "loss_on": self.loss_on}
        return described

    def encode(self, texts: list[str]) -> list[Ids]:
        """Encode a batch of documents; one that is empty afterwards is an empty array."""
        said = {i: self._conversation(text) for i, text in enumerate(texts) if isinstance(text, Conversation)}
        plain = iter(self._plain([text for i, text in enumerate(texts) if i not in said]))
        return [said[i] if i in said else next(plain) for i in range(len(texts))]

    def _conversation(self, document: Conversation) -> Ids:
        if not document:
            return np.zeros(0, np.int64)
        if self.pairs is not None:
            return self._pair(document, self.pairs)
        rendered = self.template.render(document, spans=self.loss_on == LOSSES[0])
        if len(rendered.ids):
            self.check_known(int(rendered.ids.max()))
        return np.where(rendered.assistant, rendered.ids, rendered.ids | UNSCORED)

    def _pair(self, document: Conversation, most: int) -> Ids:
        """A text's tokens, not to be predicted, and its answer's; what is too long is cut at its end."""
        messages, _ = document.parsed
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"]:
            raise UsageError(
                f"objective.kind=text_to_text: a row has the turns {', '.join(roles)}. An encoder-decoder learns "
                'pairs of one text and one answer: {"input": ..., "target": ...}.'
            )
        said, answered = (str(message["content"]) for message in messages)
        inputs = self._tokens(said)
        targets = [token for token in self._tokens(answered) if token != self.tokenizer.eos_token_id]
        targets = [*targets[: most // 2 - 1], int(self.tokenizer.eos_token_id)]
        inputs = inputs[: most - len(targets)]
        ids = np.asarray([*inputs, *targets], dtype=np.int64)
        self.check_known(int(ids.max()))
        ids[: len(inputs)] |= UNSCORED
        return ids

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])

    def _plain(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        try:
            rows = self.tokenizer(
                texts, add_special_tokens=self.special_tokens, return_attention_mask=False, verbose=False
            )["input_ids"]
        except Exception as error:  # every tokenizer library has its own
            words = " ".join(str(error).split())[:200]
            raise UsageError(
                f"data: the tokenizer cannot encode the text ({type(error).__name__}: {words}). Put the original's "
                "tokenizer files beside the weights."
            ) from error
        eos = self.tokenizer.eos_token_id
        encoded = []
        for row in rows:
            if self.append_eos and (not row or row[-1] != eos):
                row = [*row, eos]
            ids = np.asarray(row, dtype=np.int64)
            if len(ids):
                self.check_known(int(ids.max()))
            encoded.append(ids)
        return encoded

    def stream(self, texts: Iterable[str]) -> Iterator[Ids]:
        """Encode documents one after the other, leaving out empty ones."""
        source = iter(texts)
        while batch := list(islice(source, _BATCH)):
            yield from (ids for ids in self.encode(batch) if len(ids))
