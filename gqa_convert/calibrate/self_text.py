"""Calibration text that the source model writes itself, so that nobody needs data to convert well.

Shape suffixes: N windows, T tokens per window, S encoder positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.tokens import shorter
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source, load_model

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int], None]

_SHORT_ANSWER = 16
PIECE = 256
"""Tokens of the longest document that is written from nothing; see `docs/merging.md` for what longer ones cost."""


def self_tokens(
    source: Source,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch: int = 32,
    piece: int = PIECE,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Sample windows of text from a decoder-only model, whole in memory in its stored dtype.

    Windows start with BOS, or with a token drawn evenly from the vocabulary where there is none. When the model ends a
    document, the window goes on with a new one; so it does every `piece` tokens, as what a model writes from nothing
    loses its way, and every token costs more than the last.

    Args:
        source: the checkpoint.
        sequences: windows to write.
        length: tokens per window.
        seed: for the sampling.
        temperature: of the sampling; nothing else bends the model's distribution.
        batch: windows written at a time.
        piece: tokens of the longest document.
        device: where to run.
        progress: called with the number of windows written since the last call.

    Returns:
        ids_NT, int64.

    Raises:
        UnsupportedModelError: if the model is an encoder-decoder, which answers and does not begin.
    """
    import torch

    model = load_model(source, device=device)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{source.folder}: an encoder-decoder cannot write text from nothing. Name a text to calibrate on."
        )
    begin, ends = document_marks(model)
    pieces, written = -(-length // piece), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, sequences, batch):
            count = min(batch, sequences - start)
            first = _first_tokens(model, count * pieces, begin).to(device)
            drawn = _sample(model, {"input_ids": first}, min(piece, length), temperature, begin, ends).cpu()
            written.append(drawn.reshape(count, -1)[:, :length])
            if progress:
                progress(count)
    return torch.cat(written)


def own_answers(
    source: Source,
    rows: Sequence[Tensor],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    batch: int = 32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Tensor]]:
    """Let an encoder-decoder answer each row of encoder inputs, and return both sides as calibration inputs.

    An answer ends where the model ends it, or is as long as its input (16 tokens, if that is shorter). Answers are cut
    to few lengths like their inputs (`encoder_inputs`), and what has one pair of lengths comes back together.

    Args:
        source: the checkpoint.
        rows: (N, S) ids, one tensor a length.
        seed: for the sampling.
        temperature: of the sampling.
        batch: rows answered at a time.
        device: where to run.
        progress: called with the number of rows answered since the last call.

    Returns:
        `input_ids` (N, S) and `decoder_input_ids` (N, T), the latter starting with the decoder's start token.
    """
    import torch

    model = load_model(source, device=device)
    begin, ends = document_marks(model)
    by_lengths: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in (part for ids_NS in rows for part in ids_NS.split(batch)):
            longest = max(part.shape[1], _SHORT_ANSWER)
            inputs = {"input_ids": part.to(device)}
            written = _sample(model, inputs, longest, temperature, begin, ends, renew=False).cpu()
            for question, answer in zip(part, written, strict=True):
                read = answer[: shorter(tokens_read(answer, ends))]
                by_lengths.setdefault((len(question), len(read)), []).append((question, read))
            if progress:
                progress(len(part))
    pairs = ([torch.stack(side) for side in zip(*by_lengths[key], strict=True)] for key in sorted(by_lengths))
    return [{"input_ids": questions, "decoder_input_ids": answers} for questions, answers in pairs]


def tokens_read(answer: Tensor, ends: list[int]) -> int:
    """Tokens that the decoder reads to write an answer: all before the one that ends it, at least the start token."""
    import torch

    over = torch.isin(answer[1:], torch.tensor(ends, dtype=answer.dtype)).nonzero()
    return int(over[0]) + 1 if len(over) else len(answer)


def document_marks(model: Any) -> tuple[int | None, list[int]]:
    """The token that begins a document (None if there is none) and those that end one."""
    text = model.config.get_text_config(decoder=True)
    settings = model.generation_config
    begin = settings.bos_token_id if settings.bos_token_id is not None else getattr(text, "bos_token_id", None)
    if model.config.is_encoder_decoder:
        begin = _decoder_start(model)
    end = settings.eos_token_id if settings.eos_token_id is not None else getattr(text, "eos_token_id", None)
    return begin, ([] if end is None else [end] if isinstance(end, int) else list(end))


def _decoder_start(model: Any) -> int | None:
    """The token that an encoder-decoder's answers start with; padding where none is named."""
    if not model.config.is_encoder_decoder:
        return None
    for settings in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if getattr(settings, name, None) is not None:
                return int(getattr(settings, name))
    return int(getattr(model.config, "pad_token_id", None) or 0)


def _first_tokens(model: Any, count: int, begin: int | None) -> Tensor:
    import torch

    if begin is not None:
        return torch.full((count, 1), begin)
    return torch.randint(0, model.config.get_text_config(decoder=True).vocab_size, (count, 1))


def _sample(
    model: Any,
    inputs: dict[str, Tensor],
    length: int,
    temperature: float,
    begin: int | None,
    ends: list[int],
    *,
    renew: bool = True,
) -> Tensor:
    """Sample `length` decoder tokens, the first included; an ended document is followed by a new one, or by padding."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_length=length,
        min_length=length if renew else None,
        eos_token_id=None if renew else ends or None,
        pad_token_id=0,
        bos_token_id=begin,
        decoder_start_token_id=_decoder_start(model),
        use_cache=True,
    )
    with torch.no_grad(), api.quiet():
        out: Tensor = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            logits_processor=LogitsProcessorList([_renewal(begin, ends)] if renew else []),
        )
    return out[:, :length]


def _renewal(begin: int | None, ends: list[int]) -> Any:
    """A logits processor that follows the end of a document by the beginning of the next."""
    import torch
    from transformers import LogitsProcessor

    class Renewal(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            # Where one token does both (GPT-2, Pythia), what ended a document has begun the next.
            if begin is None or not ends or begin in ends:
                return scores
            over = torch.isin(input_ids[:, -1], torch.tensor(ends, device=input_ids.device))
            forced = torch.full_like(scores, -torch.inf)
            forced[:, begin] = 0
            return torch.where(over[:, None], forced, scores)

    return Renewal()
