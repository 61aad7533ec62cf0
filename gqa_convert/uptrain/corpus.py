"""From the data section to blocks: each source tokenised once or while training, its held-out part set apart, mixed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gqa_convert.data.batches import Collate, collate_causal, collate_pairs, collate_spans
from gqa_convert.data.blocks import Block, StoredBlocks, held_out_blocks
from gqa_convert.data.conversations import Conversation
from gqa_convert.data.documents import Corpus, SourceSpec, open_corpus
from gqa_convert.data.encoding import Encoder
from gqa_convert.data.hub_check import FIRST_WAITS
from gqa_convert.data.mixture import MixedBlocks, Mixture
from gqa_convert.data.packing import PackedBlocks, held_out_packed
from gqa_convert.data.spans import SpanCorruption, sentinel_ids
from gqa_convert.data.store import TokenStore, remove_stale
from gqa_convert.data.stream import StreamedBlocks
from gqa_convert.data.strided import StridedBlocks, stream_count
from gqa_convert.errors import UsageError
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.config_data import SourceSection
from gqa_convert.uptrain.making import Making, Stopped, Tell
from gqa_convert.uptrain.tokenising import usable_processes

_HELD_OUT_SEED = 0
_FEWEST = 2
"""Tokens of which one predicts another; shards of which one can be held out."""
_SHARDS_ENOUGH = 16
"""Of a hub dataset, for one of them to be held out unasked."""

SEQ2SEQ = ("span_corruption", "text_to_text")
"""Objectives of encoder-decoders."""

SourceBlocks = StoredBlocks | PackedBlocks | StreamedBlocks | StridedBlocks


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """Blocks to evaluate on.

    Attributes:
        name: of its curve; empty for the only set of a run.
        blocks: each with its number of real tokens.
        main: whether it is part of the run's one held-out loss, by which targets are met and checkpoints compared.
    """

    name: str
    blocks: list[tuple[Block, int]]
    main: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the loop reads.

    Attributes:
        blocks: training blocks without end.
        sets: held-out blocks to evaluate on.
        collate: makes tensors of training blocks.
        collate_held_out: of held-out ones; for span corruption the spans are the same whatever the run's seed, so that
            losses of runs with different seeds are of one task.
        stores: by source, the tokens of the training text; None where it is streamed.
    """

    blocks: SourceBlocks | MixedBlocks
    sets: tuple[HeldOutSet, ...]
    collate: Collate
    collate_held_out: Collate
    stores: dict[str, TokenStore | None]

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the training text; None when streaming."""
        counts = [None if store is None else store.total for store in self.stores.values()]
        return None if None in counts else sum(count for count in counts if count is not None)

    def state(self, block: int) -> dict[str, Any]:
        """What a checkpoint needs beside the step number so that training goes on with `block`."""
        names = list(self.stores)
        if not isinstance(self.blocks, MixedBlocks):
            return _source_state(self.blocks, self.stores[names[0]], block)
        inside = self.blocks.mixture.passed(block)
        parts = zip(names, self.blocks.components, inside, strict=True)
        return {"sources": {name: _source_state(part, self.stores[name], at) for name, part, at in parts}}


def _source_state(blocks: Any, store: TokenStore | None, block: int) -> dict[str, Any]:
    if store is None:
        state: dict[str, Any] = blocks.state(block)
        return state
    return {"train_tokens": store.total, "digest": store.digest}


def source_spec(section: SourceSection) -> SourceSpec:
    """The data room's form of a source section."""
    return SourceSpec(**section.model_dump())


def objective_parts(config: UptrainConfig, tokenizer: Any, model_config: Any) -> tuple[Collate, Collate, int]:
    """Choose how training and held-out blocks become tensors, and how many tokens of text a block has.

    Raises:
        UsageError: if model and objective do not fit, or the tokenizer lacks sentinels.
    """
    is_seq2seq = bool(getattr(model_config, "is_encoder_decoder", False))
    if is_seq2seq != (config.objective.kind in SEQ2SEQ):
        needed = " or ".join(SEQ2SEQ) if is_seq2seq else "causal_lm"
        raise UsageError(f"objective.kind={config.objective.kind}: a {model_config.model_type} model needs {needed}.")
    if not is_seq2seq:
        causal = collate_causal(config.separate_documents)
        return causal, causal, config.data.context
    start = getattr(model_config, "decoder_start_token_id", None)
    start = int(start if start is not None else model_config.pad_token_id)
    if config.objective.kind == "text_to_text":
        pairs = collate_pairs(decoder_start=start, pad=int(model_config.pad_token_id or 0))
        return pairs, pairs, config.data.context - 1
    corruption = SpanCorruption.fitting(
        config.data.context,
        sentinels=sentinel_ids(tokenizer),
        eos=int(tokenizer.eos_token_id),
        density=config.objective.density,
        mean_span=config.objective.mean_span,
    )
    collate, held_out = (
        collate_spans(corruption, seed=seed, decoder_start=start) for seed in (config.train.seed, _HELD_OUT_SEED)
    )
    return collate, held_out, corruption.raw_length


def run_encoder(config: UptrainConfig, tokenizer: Any, model_config: Any) -> Encoder:
    """What makes a run's documents token ids."""
    return Encoder(
        tokenizer,
        special_tokens=config.special_tokens,
        append_eos=config.append_eos,
        limit=_vocabulary(model_config),
        loss_on=config.data.loss_on,
        pairs=config.data.context if config.objective.kind == "text_to_text" else None,
    )


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
        state: of a checkpoint, to go on from.
        stopped: asked now and then during long work; True ends it.
        check: read tokenised corpora once to make sure that they are whole.

    Raises:
        UsageError: if sources are missing or empty, or the text is not that of the checkpoint.
        Preempted: if `stopped` says so.
        HubError: if a hub dataset cannot be reached.
    """
    encoder = run_encoder(config, tokenizer, model_config)
    collate, collate_held_out, length = objective_parts(config, tokenizer, model_config)
    root = Path(config.data.cache or Path(config.output) / "tokens")
    making = Making(root, encoder, tell, stopped, check, config.data.processes or usable_processes())
    remove_stale(making.root)
    opening = _Opening(config, making, length)
    named = config.data.named
    weight = sum(share for _, _, share in named)
    blocks: list[SourceBlocks] = []
    stores: dict[str, TokenStore | None] = {}
    sets: list[HeldOutSet] = []
    for name, section, share in named:
        before = state or {}
        if len(named) > 1:
            before = before.get("sources", {}).get(name) or {}
        one, stores[name], held = opening.source(section, name if len(named) > 1 else "", before, share / weight)
        blocks.append(one)
        sets += [held] if held is not None else []
    if config.data.held_out_source is not None:
        sets.append(opening.apart("", config.data.held_out_source))
    if not sets:
        raise UsageError("data: no source has documents to hold out. Raise held_out_fraction, or give held_out_source.")
    sets += [opening.apart(name, section, main=False) for name, section in config.evaluation.sets.items()]
    mixed = MixedBlocks(Mixture([share for _, _, share in named]), blocks) if len(blocks) > 1 else blocks[0]
    return TrainingData(
        blocks=mixed, sets=tuple(sets), collate=collate, collate_held_out=collate_held_out, stores=stores
    )


@dataclass(frozen=True)
class _Opening:
    """Opens the sources of a run."""

    config: UptrainConfig
    making: Making
    length: int

    def source(
        self, section: SourceSection, name: str, state: dict[str, Any], share: float
    ) -> tuple[SourceBlocks, TokenStore | None, HeldOutSet | None]:
        """A source's blocks, its store if it is not streamed, and what of it is evaluated on."""
        data, seed = self.config.data, self.config.train.seed if self.config.data.shuffle else None
        corpus = open_corpus(source_spec(section), waits=FIRST_WAITS)
        whole = self.whole(corpus)
        apart = data.held_out_source is not None
        fraction = 0.0 if apart else data.held_out_fraction
        limit = self.config.evaluation.tokens
        limit = None if limit is None else max(1, round(limit * share))
        blocks: SourceBlocks
        held: TokenStore | None
        train: TokenStore | None = None
        if data.streaming:
            if not apart and self._by_shard(corpus, state):
                corpus, last = without_last(corpus)
                held, fraction = self.making.evaluation(last, None, limit), 0.0
            else:
                held = None if apart else self.making.evaluation(corpus, fraction, limit)
            blocks = self._streamed(corpus, state, seed, fraction, whole)
        else:
            stored, held = self.making.both(corpus, fraction)
            train, held = stored, None if apart else held
            _check_same_text(state, stored, name)
            if whole:
                blocks = PackedBlocks(stored, self.length, seed=seed)
                self.making.tell(f"packed whole: {blocks.padding:.1%} of each sequence is padding")
            else:
                blocks = StoredBlocks(stored, self.length, seed=seed, window=data.window)
        if held is not None and held.total < _FEWEST and name:
            self.making.tell(f"{name}: too few documents to hold any out; it has no curve of its own")
            held = None
        evaluated = None if held is None else HeldOutSet(name=name, blocks=self.cut(held, limit, whole))
        return blocks, train, evaluated

    def _by_shard(self, corpus: Corpus, state: dict[str, Any]) -> bool:
        """Whether the last shard is held out, and not documents from everywhere."""
        by, shards = self.config.data.held_out_by, len(corpus.shards)
        if by == "shard" and shards < _FEWEST:
            raise UsageError(f"data.held_out_by=shard: {', '.join(corpus.spec.paths)} is a single shard.")
        if by == "auto" and "count" not in state and state.get("shards") == shards:
            return False  # a checkpoint of a version that held out documents alone
        return by == "shard" or (by == "auto" and corpus.remote and shards >= _SHARDS_ENOUGH)

    def _streamed(
        self, corpus: Corpus, state: dict[str, Any], seed: int | None, fraction: float, whole: bool
    ) -> StreamedBlocks | StridedBlocks:
        """The corpus as one stream, or dealt out as several: as a checkpoint has it, else as the configuration says."""
        data, sequences = self.config.data, self.config.train.batch_sequences
        streams = 1 if state else data.streams or stream_count(len(corpus.shards), sequences)
        streams = int(state.get("count", streams))

        def opened(part: Corpus, at: dict[str, Any] | None) -> StreamedBlocks:
            window = -(-data.window // streams)  # of all streams together as many as of one
            return StreamedBlocks(
                part,
                self.making.encoder,
                self.length,
                seed=seed,
                window=window,
                held_out=fraction,
                whole=whole,
                state=at or None,
            )

        if streams == 1:
            return opened(corpus, state)
        if streams > len(corpus.shards) or sequences % streams:
            raise UsageError(
                f"data.streams={streams}: must divide train.batch_sequences={sequences}, and the corpus has "
                f"{len(corpus.shards)} shards. Leave it out, or choose a smaller one."
            )
        return StridedBlocks(corpus, streams, opened, state=state or None)

    def apart(self, name: str, section: SourceSection, *, main: bool = True) -> HeldOutSet:
        """A set of documents of their own."""
        corpus = open_corpus(source_spec(section), waits=FIRST_WAITS)
        limit = self.config.evaluation.tokens
        held = self.making.evaluation(corpus, None, limit)
        return HeldOutSet(name=name, blocks=self.cut(held, limit, self.whole(corpus)), main=main)

    def whole(self, corpus: Corpus) -> bool:
        """Whether documents are kept whole.

        Raises:
            UsageError: for conversations that are to be corrupted.
        """
        talks = isinstance(corpus.first(), Conversation)
        if self.config.objective.kind == "text_to_text":
            if talks:
                return True
            raise UsageError(
                f"data: {', '.join(corpus.spec.paths)} holds text, and objective.kind=text_to_text learns answers. "
                'Give rows of {"input": ..., "target": ...}, or use span_corruption.'
            )
        if talks:
            if self.config.objective.kind == "span_corruption":
                raise UsageError(
                    f"data: {', '.join(corpus.spec.paths)} holds conversations, and objective.kind=span_corruption "
                    "hides spans of text. Use text_to_text for a text and its answer, or give rows of text."
                )
            way = self.making.encoder.template.way
            self.making.tell(
                "conversations by the model's chat template, "
                + (f"learnt where the assistant speaks ({way})" if self.config.data.loss_on == "assistant" else "whole")
            )
        return self.config.data.packing == "whole" or (self.config.data.packing == "auto" and talks)

    def cut(self, held: TokenStore, limit: int | None, whole: bool) -> list[tuple[Block, int]]:
        """Blocks of a held-out store."""
        if whole:
            return held_out_packed(held, self.length, limit)
        evaluated = held_out_blocks(held, self.length, limit)
        if self.config.objective.kind == "span_corruption":
            # Corruption needs whole blocks; a short last one is left out unless it is all there is.
            evaluated = [pair for pair in evaluated if pair[1] > self.length] or evaluated[:1]
        return evaluated


def without_last(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """A corpus without its last shard, and that shard as a corpus of its own."""
    first, last = (
        replace(corpus, shards=corpus.shards[part], files=corpus.files[part], identity=[*corpus.identity, name])
        for part, name in ((slice(None, -1), "all but the last shard"), (slice(-1, None), "the last shard"))
    )
    return first, last


def _vocabulary(model_config: Any) -> int | None:
    """How many token ids a model knows."""
    size = getattr(model_config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else None


def _check_same_text(state: dict[str, Any], train: TokenStore, name: str) -> None:
    """Of other text the step number would name other blocks: some would come twice and some never."""
    of = f" of {name}" if name else ""
    count = state.get("train_tokens", train.total)
    if count != train.total:
        raise UsageError(
            f"data: the text{of} to train on had {count:,} tokens when the checkpoint was written and has "
            f"{train.total:,} now. Put the files back as they were, or choose another output."
        )
    if state.get("digest") not in (None, train.digest):
        raise UsageError(
            f"data: the text{of} to train on had other tokens, or in another order, when the checkpoint was written "
            f"(their number, {count:,}, is the same). Put the files back as they were, or choose another output."
        )
