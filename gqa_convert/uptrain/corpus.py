"""From the data section to blocks: tokenised once or while training, with the held-out part set apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.data.batches import Collate, collate_causal, collate_spans
from gqa_convert.data.blocks import Block, StoredBlocks, held_out_blocks
from gqa_convert.data.documents import Corpus, SourceSpec, open_corpus
from gqa_convert.data.encoding import Encoder
from gqa_convert.data.spans import SpanCorruption, sentinel_ids
from gqa_convert.data.split import is_held_out
from gqa_convert.data.store import StoreWriter, TokenStore, remove_stale
from gqa_convert.data.stream import StreamedBlocks
from gqa_convert.errors import Preempted, UsageError
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.config_data import SourceSection

Tell = Callable[[str], None]
Stopped = Callable[[], bool]

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
        train_digest: what tells them from any others; None when streaming.
        held_out_tokens: tokens of the held-out text that are scored.
    """

    blocks: StoredBlocks | StreamedBlocks
    held_out: list[tuple[Block, int]]
    collate: Collate
    collate_held_out: Collate
    train_tokens: int | None
    train_digest: str | None
    held_out_tokens: int

    def state(self, block: int) -> dict[str, Any]:
        """What a checkpoint needs beside the step number so that training goes on with `block`."""
        if isinstance(self.blocks, StreamedBlocks):
            return self.blocks.state(block)
        return {"train_tokens": self.train_tokens, "digest": self.train_digest}


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
    stopped: Stopped = lambda: False,
    check: bool = True,
) -> TrainingData:
    """Tokenise what must be tokenised (once; later runs find it) and open the blocks.

    Args:
        config: the run.
        tokenizer: the model's.
        model_config: the model's.
        tell: told of long work.
        state: of a checkpoint, to go on from when streaming.
        stopped: asked now and then during long work; True ends it.
        check: read tokenised corpora once to make sure that they are whole.

    Raises:
        UsageError: if sources are missing or empty, or the text is not that of the checkpoint.
        Preempted: if `stopped` says so.
        HubError: if a hub dataset cannot be reached.
    """
    encoder = Encoder(
        tokenizer,
        special_tokens=config.special_tokens,
        append_eos=config.append_eos,
        limit=_vocabulary(model_config),
    )
    collate, collate_held_out, length = objective_parts(config, tokenizer, model_config)
    corpus = open_corpus(source_spec(config.data.source))
    making = _Making(Path(config.data.cache or Path(config.output) / "tokens"), encoder, tell, stopped, check)
    remove_stale(making.root)
    apart = config.data.held_out_source
    fraction = 0.0 if apart is not None else config.data.held_out_fraction
    limit = config.evaluation.tokens
    seed = config.train.seed if config.data.shuffle else None
    train: TokenStore | None = None
    if config.data.streaming:
        held = making.evaluation(corpus, apart, fraction, limit)
    else:
        train, held = making.both(corpus, fraction)
        _check_same_text(state or {}, train)
        if apart is not None:
            held = making.evaluation(corpus, apart, fraction, None)
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
        train_digest=None if train is None else train.digest,
        held_out_tokens=sum(real - 1 for _, real in evaluated),
    )


def _vocabulary(model_config: Any) -> int | None:
    """How many token ids a model knows."""
    size = getattr(model_config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else None


def _check_same_text(state: dict[str, Any], train: TokenStore) -> None:
    """Of other text the step number would name other blocks: some would come twice and some never."""
    count = state.get("train_tokens", train.total)
    if count != train.total:
        raise UsageError(
            f"data: the text to train on had {count:,} tokens when the checkpoint was written and has {train.total:,} "
            "now. Put the files back as they were, or choose another output."
        )
    if state.get("digest") not in (None, train.digest):
        raise UsageError(
            f"data: the text to train on had other tokens, or in another order, when the checkpoint was written (their "
            f"number, {count:,}, is the same). Put the files back as they were, or choose another output."
        )


@dataclass(frozen=True)
class _Making:
    """Tokenised corpora: found in `root`, or made there now."""

    root: Path
    encoder: Encoder
    tell: Tell
    stopped: Stopped
    check: bool

    def both(self, corpus: Corpus, fraction: float) -> tuple[TokenStore, TokenStore]:
        """The training and held-out stores of a corpus."""
        key = self._key(corpus, fraction=fraction)
        names = (f"{key}-train", f"{key}-held-out")
        train, held = (self._opened(name) for name in names)
        if train is not None and held is not None:
            return train, held
        self.tell("tokenising the corpus")
        with self._writing(*names) as writers:
            for texts in _batches(self._heeding(corpus.all_documents())):
                for text, ids in zip(texts, self.encoder.encode(texts), strict=True):
                    if len(ids):
                        writers[is_held_out(text, fraction)].add(ids)
            self.tell(f"tokenised: {writers[0].total:,} tokens to train on, {writers[1].total:,} held out")
            return writers[0].commit({}), writers[1].commit({})

    def evaluation(self, corpus: Corpus, apart: SourceSection | None, fraction: float, limit: int | None) -> TokenStore:
        """Held-out documents alone: of their own source, or picked from the stream until there are `limit` tokens."""
        source = corpus if apart is None else open_corpus(source_spec(apart))
        key = self._key(source, fraction=1.0 if apart is not None else fraction, limit=limit)
        kept = self._opened(f"{key}-evaluation")
        if kept is not None:
            return kept
        self.tell("collecting held-out documents")
        with self._writing(f"{key}-evaluation") as writers:
            texts = self._heeding(source.all_documents())
            wanted = (text for text in texts if apart is not None or is_held_out(text, fraction))
            for ids in self.encoder.stream(wanted):
                writers[0].add(ids)
                if limit is not None and writers[0].total > limit:
                    break
            return writers[0].commit({})

    def _key(self, corpus: Corpus, **more: Any) -> str:
        described = {"source": repr(corpus.spec), "files": corpus.identity, **self.encoder.identity(), **more}
        return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _opened(self, name: str) -> TokenStore | None:
        store = TokenStore.open(self.root / name, check=self.check, tell=self.tell)
        if store is not None:
            self.encoder.check_known(store.largest)
        return store

    def _heeding(self, texts: Iterator[str]) -> Iterator[str]:
        """The same texts, until somebody asks to stop."""
        for text in texts:
            if self.stopped():
                raise Preempted("stopped while reading the text, before training. Run the same command again to start.")
            yield text

    @contextmanager
    def _writing(self, *names: str) -> Iterator[list[StoreWriter]]:
        """Writers of stores; what they wrote is removed if anything goes wrong before it is committed."""
        writers: list[StoreWriter] = []
        try:
            for name in names:
                writers.append(StoreWriter(self.root / name, self.encoder.vocabulary))
            yield writers
        except BaseException:
            for writer in writers:
                writer.discard()
            raise


def _batches(texts: Iterator[str], size: int = 256) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
