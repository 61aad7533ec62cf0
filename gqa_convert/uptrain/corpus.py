"""From the data section to blocks: tokenised once or while training, with the held-out part set apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.data.batches import Collate, collate_causal, collate_spans
from gqa_convert.data.blocks import Block, StoredBlocks, held_out_blocks
from gqa_convert.data.documents import Corpus, SourceSpec, open_corpus
from gqa_convert.data.encoding import Encoder
from gqa_convert.data.spans import SpanCorruption, sentinel_ids
from gqa_convert.data.split import is_held_out
from gqa_convert.data.store import StoreWriter, TokenStore
from gqa_convert.data.stream import StreamedBlocks
from gqa_convert.errors import UsageError
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.config_data import SourceSection

Tell = Callable[[str], None]

_HELD_OUT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the loop reads.

    Attributes:
        blocks: training blocks without end.
        held_out: blocks to evaluate on, each with its number of real tokens.
        collate: makes tensors of training blocks.
        collate_held_out: of held-out ones; for span corruption the spans are the same whatever the run's seed, so that
            losses of runs with different seeds are of one task.
        train_tokens: tokens of the training text; None when streaming.
        held_out_tokens: tokens of the held-out text that are scored.
    """

    blocks: StoredBlocks | StreamedBlocks
    held_out: list[tuple[Block, int]]
    collate: Collate
    collate_held_out: Collate
    train_tokens: int | None
    held_out_tokens: int

    def state(self, block: int) -> dict[str, Any]:
        """What a checkpoint needs beside the step number so that training goes on with `block`."""
        if isinstance(self.blocks, StreamedBlocks):
            return self.blocks.state(block)
        return {"train_tokens": self.train_tokens}


def source_spec(section: SourceSection) -> SourceSpec:
    """The data room's form of a source section."""
    return SourceSpec(**section.model_dump())


def objective_parts(config: UptrainConfig, tokenizer: Any, model_config: Any) -> tuple[Collate, Collate, int]:
    """Choose how training and held-out blocks become tensors, and how many tokens of text a block has.

    Raises:
        UsageError: if model and objective do not fit, or the tokenizer lacks sentinels.
    """
    is_seq2seq = bool(getattr(model_config, "is_encoder_decoder", False))
    if is_seq2seq != (config.objective.kind == "span_corruption"):
        needed = "span_corruption" if is_seq2seq else "causal_lm"
        raise UsageError(f"objective.kind={config.objective.kind}: a {model_config.model_type} model needs {needed}.")
    if not is_seq2seq:
        causal = collate_causal(config.separate_documents)
        return causal, causal, config.data.context
    corruption = SpanCorruption.fitting(
        config.data.context,
        sentinels=sentinel_ids(tokenizer),
        eos=int(tokenizer.eos_token_id),
        density=config.objective.density,
        mean_span=config.objective.mean_span,
    )
    start = getattr(model_config, "decoder_start_token_id", None)
    start = int(start if start is not None else model_config.pad_token_id)
    collate, held_out = (
        collate_spans(corruption, seed=seed, decoder_start=start) for seed in (config.train.seed, _HELD_OUT_SEED)
    )
    return collate, held_out, corruption.raw_length


def prepare_data(
    config: UptrainConfig,
    tokenizer: Any,
    model_config: Any,
    *,
    tell: Tell = lambda _: None,
    state: dict[str, Any] | None = None,
) -> TrainingData:
    """Tokenise what must be tokenised (once; later runs find it) and open the blocks.

    Args:
        config: the run.
        tokenizer: the model's.
        model_config: the model's.
        tell: told of long work.
        state: of a checkpoint, to go on from when streaming.

    Raises:
        UsageError: if sources are missing or empty, or the text is not that of the checkpoint.
        HubError: if a hub dataset cannot be reached.
    """
    encoder = Encoder(tokenizer, special_tokens=config.special_tokens, append_eos=config.append_eos)
    collate, collate_held_out, length = objective_parts(config, tokenizer, model_config)
    corpus = open_corpus(source_spec(config.data.source))
    apart = config.data.held_out_source
    fraction = 0.0 if apart is not None else config.data.held_out_fraction
    root = Path(config.data.cache or Path(config.output) / "tokens")
    limit = config.evaluation.tokens
    seed = config.train.seed if config.data.shuffle else None
    train: TokenStore | None = None
    if config.data.streaming:
        held = _held_out_store(root, apart, corpus, encoder, fraction, limit, tell)
    else:
        train, held = _stores(root, corpus, encoder, fraction, tell)
        _check_same_text(state or {}, train)
        if apart is not None:
            held = _held_out_store(root, apart, corpus, encoder, fraction, None, tell)
    blocks: StoredBlocks | StreamedBlocks
    if train is not None:
        blocks = StoredBlocks(train, length, seed=seed, window=config.data.window)
    else:
        blocks = StreamedBlocks(
            corpus, encoder, length, seed=seed, window=config.data.window, held_out=fraction, state=state or None
        )
    evaluated = held_out_blocks(held, length, limit)
    if config.objective.kind == "span_corruption":
        # Corruption needs whole blocks; a short last one is left out unless it is all there is.
        evaluated = [pair for pair in evaluated if pair[1] > length] or evaluated[:1]
    return TrainingData(
        blocks=blocks,
        held_out=evaluated,
        collate=collate,
        collate_held_out=collate_held_out,
        train_tokens=None if train is None else train.total,
        held_out_tokens=sum(real - 1 for _, real in evaluated),
    )


def _check_same_text(state: dict[str, Any], train: TokenStore) -> None:
    """Of other text the step number would name other blocks: some would come twice and some never."""
    before = state.get("train_tokens", train.total)
    if before != train.total:
        raise UsageError(
            f"data: the text to train on had {before:,} tokens when the checkpoint was written and has {train.total:,} "
            "now. Put the files back as they were, or choose another output."
        )


def _key(corpus: Corpus, encoder: Encoder, **more: Any) -> str:
    described = {"source": repr(corpus.spec), "files": corpus.identity, **encoder.identity(), **more}
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()


def _stores(root: Path, corpus: Corpus, encoder: Encoder, fraction: float, tell: Tell) -> tuple[TokenStore, TokenStore]:
    """The training and held-out stores of a corpus, from the cache or tokenised now."""
    key = _key(corpus, encoder, fraction=fraction)
    train, held = TokenStore.open(root / f"{key}-train"), TokenStore.open(root / f"{key}-held-out")
    if train is not None and held is not None:
        return train, held
    tell("tokenising the corpus")
    writers = (
        StoreWriter(root / f"{key}-train", encoder.vocabulary),
        StoreWriter(root / f"{key}-held-out", encoder.vocabulary),
    )
    try:
        for text_batch in _batches(corpus.all_documents()):
            for text, ids in zip(text_batch, encoder.encode(text_batch), strict=True):
                if len(ids):
                    writers[is_held_out(text, fraction)].add(ids)
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    tell(f"tokenised: {writers[0].total:,} tokens to train on, {writers[1].total:,} held out")
    return writers[0].commit({}), writers[1].commit({})


def _held_out_store(
    root: Path, apart: SourceSection | None, corpus: Corpus, encoder: Encoder, fraction: float, limit: int | None,
    tell: Tell,
) -> TokenStore:  # fmt: skip
    """Held-out documents alone: of their own source, or picked from the stream until there are `limit` tokens."""
    source = corpus if apart is None else open_corpus(source_spec(apart))
    key = _key(source, encoder, fraction=1.0 if apart is not None else fraction, limit=limit)
    found = TokenStore.open(root / f"{key}-evaluation")
    if found is not None:
        return found
    tell("collecting held-out documents")
    writer = StoreWriter(root / f"{key}-evaluation", encoder.vocabulary)
    try:
        wanted = (t for t in source.all_documents() if apart is not None or is_held_out(t, fraction))
        for ids in encoder.stream(wanted):
            writer.add(ids)
            if limit is not None and writer.total > limit:
                break
    except BaseException:
        writer.discard()
        raise
    return writer.commit({})


def _batches(texts: Iterator[str], size: int = 256) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
