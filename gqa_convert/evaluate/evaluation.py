"""Evaluate a checkpoint and its conversions on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.provenance import versions
from gqa_convert.data import reading
from gqa_convert.data.conversations import LOSSES, Conversation
from gqa_convert.errors import UsageError
from gqa_convert.evaluate import examples as ex
from gqa_convert.evaluate import models, text
from gqa_convert.evaluate.cache_formats import WithCache
from gqa_convert.evaluate.decode.settings import QUANTISED
from gqa_convert.evaluate.figures import model_figures, pair_figures
from gqa_convert.evaluate.places import Places, parts
from gqa_convert.evaluate.results import Comparison, Evaluation, ModelResult
from gqa_convert.evaluate.samples import chosen, side_by_side, written
from gqa_convert.evaluate.scoring import WindowSums, score, score_beside

DEFAULT_CONTEXT = 2048
"""Tokens per window where neither the user nor the model's configuration says; also the most that is taken unasked."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How to measure. `None` for context and stride: the model's own context, and half of it.

    `loss_on` is for conversations: score what the `assistant` says, or `all`. `caches`: also measure every model with
    its cache in these formats (`fp8`, `int8`, `int4`). `samples`: let every model go on from so many beginnings of the
    text.

    Raises:
        UsageError: if `loss_on` is neither, or there is no such format, or samples are fewer than none.
    """

    data: str
    field: str = "text"
    separator: str = ""
    context: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    special: bool = True
    eos: bool = True
    loss_on: str = LOSSES[0]
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    caches: tuple[str, ...] = ()
    samples: int = 0

    def __post_init__(self) -> None:
        if self.loss_on not in LOSSES:
            raise UsageError(f"--loss-on {self.loss_on}: choose one of {', '.join(LOSSES)}.")
        if self.samples < 0:
            raise UsageError(f"--samples {self.samples}: must not be negative.")
        unknown = [name for name in self.caches if name not in QUANTISED]
        if unknown:
            raise UsageError(f"--quantised-cache {unknown[0]}: choose from {', '.join(QUANTISED)}.")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the models are scored on, and what to call it.

    Attributes:
        name: `next token`, `span corruption`, `pairs` or `transcripts`.
        context: tokens per window.
        stride: tokens from one window to the next.
        examples: the windows.
        block: neighbouring windows that share text, so that they are resampled together; 1 where none do.
    """

    name: str
    context: int
    stride: int
    examples: list[ex.Example] = field(repr=False)
    block: int = 1


def evaluate(
    base: str | Path,
    converted: Sequence[str | Path],
    settings: EvalSettings,
    *,
    on_windows: Callable[[int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure what conversions cost on held-out text.

    The original and one conversion are in memory at a time.

    Args:
        base: the original: a folder, a hub id, or `demo`.
        converted: conversions of it.
        settings: the data and how to cut it.
        on_windows: called with the number of windows scored since the last call.
        on_total: called once with the number of windows that will be scored.

    Raises:
        UsageError: if the data or a setting does not fit.
        GQAConvertError: if a model cannot be loaded.
    """
    trust = settings.trust_remote_code
    first = models.subject(str(base), trust_remote_code=trust)
    others = [models.subject(str(folder), trust_remote_code=trust) for folder in converted]
    tokenizer = first.source.tokenizer()
    task = make_task(first, tokenizer, settings)
    if on_total is not None:
        pairs = len(others) + len(settings.caches) * (1 + len(others))
        on_total(len(task.examples) * max(1, pairs))
    original = models.load(first, dtype=settings.dtype, device=settings.device)
    places = Places(tokenizer, task.examples) if others or settings.caches else None
    begun = chosen(task.examples, settings.samples)
    said = [(first.name, written(original, tokenizer, begun))]
    sums: WindowSums | None = None
    original_result: ModelResult | None = None

    def compared(subject: models.Subject, model: Any, caches: Sequence[str]) -> list[Comparison]:
        """A model with each of the caches (`""`: its own) beside the original, which runs once for all."""
        nonlocal sums, original_result
        run = [WithCache(model, cache) if cache else model for cache in caches]
        scored = score_beside(
            original, run, task.examples, batch_size=settings.batch_size, places=places, on_windows=on_windows
        )
        found = []
        for cache, runs, (before, seen, seconds) in zip(caches, run, scored, strict=True):
            assert places is not None
            sums = before
            original_result = original_result or _result(first, original, before, task)
            result = _result(subject, runs, seen, task, cache)
            figures = pair_figures(before, seen, original_result.figures, result.figures, block=task.block)
            where = parts(places, before, seen, block=task.block)
            found.append(Comparison(model=result, figures=figures, seconds=seconds, parts=where))
        return found

    comparisons: list[Comparison] = []
    quantised = compared(first, original, settings.caches) if settings.caches else []
    for other in others:
        model = models.load(other, dtype=settings.dtype, device=settings.device)
        own, *rounded = compared(other, model, ("", *settings.caches))
        comparisons.append(own)
        said.append((other.name, written(model, tokenizer, begun)))
        quantised += rounded
        del model, own, rounded
    if sums is None or original_result is None:
        sums, _, _ = score(original, None, task.examples, batch_size=settings.batch_size, on_windows=on_windows)
        original_result = _result(first, original, sums, task)
    return Evaluation(
        task=task.name,
        data=Path(settings.data).name,
        context=task.context,
        stride=task.stride,
        windows=len(task.examples),
        tokens=sum(sums.tokens),
        bytes=sum(sums.size),
        dtype=models.dtype_name(original),
        device=device_name(original),
        settings={name: getattr(settings, name) for name in ("field", "separator", "special", "eos", "max_windows")},
        versions=versions(),
        base=original_result,
        converted=tuple(comparisons),
        quantised=tuple(quantised),
        samples=side_by_side(begun, tokenizer, said),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def _result(subject: models.Subject, model: Any, sums: WindowSums, task: Task, cache: str = "") -> ModelResult:
    return ModelResult(
        name=f"{subject.name}, {cache} cache" if cache else subject.name,
        cache=cache,
        query_heads=subject.query_heads,
        kv_heads=subject.kv_heads,
        kv_heads_per_layer=subject.per_layer,
        figures=model_figures(subject, model, sums, block=task.block),
    )


def with_tasks(
    evaluation: Evaluation,
    folders: Sequence[str | Path],
    tasks: Sequence[str],
    settings: EvalSettings,
    *,
    limit: int | None,
) -> Evaluation:
    """Add the results of lm-eval tasks to an evaluation. See `tasks.run_tasks`."""
    from gqa_convert.evaluate.tasks import run_tasks

    scores = run_tasks(
        [task.strip() for task in tasks],
        [models.subject(str(folder), trust_remote_code=settings.trust_remote_code) for folder in folders],
        limit=limit,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        device=settings.device,
    )
    return replace(evaluation, tasks=scores)


def make_task(subject: models.Subject, tokenizer: Any, settings: EvalSettings) -> Task:
    """Cut the data into what models of this kind are scored on.

    Raises:
        UsageError: if the data or a setting does not fit the model.
    """
    longest = subject.max_context
    context = settings.context or min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise UsageError(f"--context {context}: {subject.name} is made for {longest} tokens (config.json).")
    if settings.max_windows is not None and settings.max_windows < 1:
        raise UsageError(f"--max-windows {settings.max_windows}: at least one window is needed.")
    if subject.is_encoder_decoder:
        return _encoder_decoder_task(subject, tokenizer, settings, context)
    documents = _documents(settings)
    if any(isinstance(document, Conversation) for document in documents):
        return _conversation_task(documents, tokenizer, settings, context)
    stride = settings.stride or max(1, context // 2)
    stream = text.encode(documents, tokenizer, special=settings.special, eos=settings.eos)
    cut = text.windows(len(stream.ids), context=context, stride=stride, limit=settings.max_windows)
    examples = ex.causal_examples(stream, cut)
    return Task(name="next token", context=context, stride=stride, examples=examples, block=text.overlapping(cut))


def _documents(settings: EvalSettings) -> list[str]:
    return reading.read_documents(settings.data, field=settings.field, separator=settings.separator)


def _conversation_task(documents: list[str], tokenizer: Any, settings: EvalSettings, context: int) -> Task:
    """Every conversation by itself, longer ones in parts."""
    try:
        stream = text.encode_conversations(documents, tokenizer, loss_on=settings.loss_on)
        cut = text.document_windows(stream, context=context, limit=settings.max_windows)
    except UsageError as error:
        raise UsageError(f"--data {settings.data}: {str(error).removeprefix('data: ')}") from error
    name = "assistant's turns" if settings.loss_on == LOSSES[0] else "conversations"
    return Task(name=name, context=context, stride=context, examples=ex.causal_examples(stream, cut))


def _encoder_decoder_task(subject: models.Subject, tokenizer: Any, settings: EvalSettings, context: int) -> Task:
    start = _decoder_start(subject.config)
    if subject.listens:
        from gqa_convert.evaluate.listening import transcript_examples

        examples = transcript_examples(subject, tokenizer, settings)
        return Task(name="transcripts", context=context, stride=context, examples=examples)
    if holds_pairs(settings.data):
        pairs = ex.pair_examples(settings.data, tokenizer, start=start, context=context)[: settings.max_windows]
        return Task(name="pairs", context=context, stride=context, examples=pairs)
    sentinels = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(100)]
    sentinels = [i for i in sentinels if i is not None and i != tokenizer.unk_token_id]
    if not sentinels:
        raise UsageError(
            f"--data {settings.data}: {subject.name} is an encoder-decoder model without <extra_id_0> tokens, so spans "
            'of plain text cannot be hidden. Give a .jsonl file with {"input": ..., "target": ...} lines.'
        )
    documents = _documents(settings)
    if any(isinstance(document, Conversation) for document in documents):
        raise UsageError(
            f"--data {settings.data}: holds conversations, and {subject.name} is an encoder-decoder model. Give text, "
            'or {"input": ..., "target": ...} lines.'
        )
    stream = text.encode(documents, tokenizer, special=settings.special, eos=settings.eos)
    spans = ex.span_examples(stream, sentinels, start=start, context=context, limit=settings.max_windows)
    return Task(name="span corruption", context=context, stride=context, examples=spans)


def holds_pairs(data: str) -> bool:
    """Whether data is a .jsonl file of inputs and targets."""
    return Path(data).suffix in (".jsonl", ".ndjson") and "input" in next(reading.read_records(data), {})


def _decoder_start(config: Any) -> int:
    for owner in (config, config.get_text_config(decoder=True)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 0


def device_name(model: Any) -> str:
    """The device in words: the GPU's name, or `cpu` with its number of threads."""
    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
