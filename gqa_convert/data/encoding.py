"""Documents to token ids, in batches (the tokenizers' own threads do the work)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.errors import UsageError

Ids = NDArray[np.int64]
_BATCH = 256


@dataclass(frozen=True)
class Encoder:
    """Turns texts into token ids.

    Attributes:
        tokenizer: of transformers.
        special_tokens: add what the tokenizer adds by itself (BOS for Llama, nothing for GPT-NeoX, EOS for T5).
        append_eos: end every document with EOS.
        limit: how many token ids the model knows; None to take any.

    Raises:
        UsageError: if EOS is to be appended and there is none, or a text gives an id that the model does not know.
    """

    tokenizer: Any
    special_tokens: bool = True
    append_eos: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise UsageError("data.append_eos: the tokenizer has no EOS token. Set data.append_eos to false.")

    @cached_property
    def vocabulary(self) -> int:
        """One more than the largest token id, added ones included."""
        return max((*self.tokenizer.get_vocab().values(), len(self.tokenizer) - 1), default=-1) + 1

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
        return {"tokenizer": digest, "special_tokens": self.special_tokens, "append_eos": self.append_eos}

    def encode(self, texts: list[str]) -> list[Ids]:
        """Encode a batch of documents; one that is empty afterwards is an empty array."""
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
