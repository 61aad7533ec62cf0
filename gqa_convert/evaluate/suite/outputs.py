"""What encoder-decoders write, set against references and against what the original writes: ROUGE and word errors.

Both are had from the libraries that papers use (the `eval` extra): rouge-score (Lin 2004) and jiwer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from gqa_convert.calibrate.heard import transcripts
from gqa_convert.data.reading import read_records
from gqa_convert.errors import UsageError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.evaluation import EvalSettings, holds_pairs
from gqa_convert.evaluate.listening import clips
from gqa_convert.evaluate.recall import plain_documents
from gqa_convert.evaluate.results import SuiteResult
from gqa_convert.evaluate.suite.answering import result_of
from gqa_convert.hf.greedy import greedy_ids

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 128
"""Tokens of the longest answer."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an encoder reads, in parts that are answered one by one, and what should be written, None if unknown."""

    parts: tuple[dict[str, Tensor], ...]
    reference: str | None


def answers(
    subjects: Sequence[models.Subject],
    settings: EvalSettings,
    *,
    count: int,
    context: int,
    on_items: Callable[[int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> list[SuiteResult]:
    """Let encoder-decoders answer texts or write down recordings, greedily, and score what they write.

    Args:
        subjects: the models, the original first.
        settings: of the evaluation. Its data are rows of `input` and `target`, or texts without references; or sound,
            with what is said in .txt files of the same names (of a hub dataset: in the column `field`).
        count: texts, evenly spread over the data; recordings, the first.
        context: tokens that a text is cut to.
        on_items: called with the number of answers since the last call.
        on_total: called once with their number.

    Returns:
        Every score of every model, item by item: see `metrics.ANSWERS`.

    Raises:
        UsageError: if the library is not installed, or the data does not fit.
        GQAConvertError: if a model cannot be loaded.
    """
    heard = subjects[0].listens
    score = word_errors() if heard else rouge()
    tokenizer = subjects[0].source.tokenizer()
    asked = _recordings(subjects[0], settings, count) if heard else _texts(settings, tokenizer, count, context)
    if on_total is not None:
        on_total(len(asked) * len(subjects))
    results: list[SuiteResult] = []
    originals: list[str] | None = None
    for subject in subjects:
        model = models.load(subject, dtype=settings.dtype, device=settings.device)
        written = []
        for question in asked:
            parts = _heard(model, question, settings.batch_size) if heard else [_read(model, question)]
            said = (str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in parts)
            written.append(" ".join(filter(None, said)))
            if on_items is not None:
                on_items(1)
        del model
        originals = originals or written
        results += score(subject.name, written, [question.reference for question in asked], originals)
    return results


Score = Callable[[str, Sequence[str], Sequence[str | None], Sequence[str]], list[SuiteResult]]
"""Scores what a model (by name) wrote, against references and against what the original wrote."""


def rouge() -> Score:
    """ROUGE-1, -2 and -L (F1) of every answer; words are runs of letters and digits of any script, case apart.

    Raises:
        UsageError: if rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError("--suite: ROUGE is had from rouge-score: pip install 'gqa-convert[eval]'.") from error
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())

    def alike(wanted: str, seen: str) -> dict[str, float]:
        if wanted == seen:  # also where both are empty
            return dict.fromkeys(("rouge1", "rouge2", "rougeL"), 1.0)
        return {kind: float(value.fmeasure) for kind, value in scorer.score(wanted, seen).items()}

    def score(
        model: str, written: Sequence[str], references: Sequence[str | None], originals: Sequence[str]
    ) -> list[SuiteResult]:
        results = []
        known = [(wanted, seen) for wanted, seen in zip(references, written, strict=True) if wanted is not None]
        if known:
            each = [alike(wanted, seen) for wanted, seen in known]
            for kind in ("rouge1", "rouge2", "rougeL"):
                results.append(result_of(model, kind, [one[kind] for one in each], [seen for _, seen in known]))
        beside = [alike(own, seen)["rougeL"] for own, seen in zip(originals, written, strict=True)]
        same = [float(own == seen) for own, seen in zip(originals, written, strict=True)]
        return [
            *results,
            result_of(model, "rouge_original", beside, written),
            result_of(model, "same_output", same, ()),
        ]

    return score


class _Words:
    """Words for rouge-score, whose own know the letters a to z alone; of English they are the same."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def word_errors() -> Score:
    """Word and character errors of every transcript, case and punctuation apart (the paper's basic normaliser).

    Each is out of the words (characters) that were said, at least one a recording; see Radford et al. 2022, appendix C.

    Raises:
        UsageError: if jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise UsageError("--suite: word errors are had from jiwer: pip install 'gqa-convert[eval]'.") from error
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    plain = BasicTextNormalizer()

    def errors(process: Any, wanted: str, seen: str, length: Callable[[str], int]) -> tuple[float, int]:
        wanted, seen = " ".join(plain(wanted).split()), " ".join(plain(seen).split())
        if not wanted:
            return float(length(seen)), 1
        found = process(wanted, seen)
        return float(found.substitutions + found.deletions + found.insertions), length(wanted)

    def of(kind: str, model: str, pairs: Sequence[tuple[str, str]]) -> SuiteResult:
        letters = kind == "cer"
        process, length = (jiwer.process_characters, len) if letters else (jiwer.process_words, _word_count)
        counted = [errors(process, wanted, seen, length) for wanted, seen in pairs]
        scores, sizes = [value for value, _ in counted], [size for _, size in counted]
        return result_of(model, kind, scores, () if letters else [seen for _, seen in pairs], sizes)

    def score(
        model: str, written: Sequence[str], references: Sequence[str | None], originals: Sequence[str]
    ) -> list[SuiteResult]:
        known = [(wanted, seen) for wanted, seen in zip(references, written, strict=True) if wanted is not None]
        results = [of(kind, model, known) for kind in ("wer", "cer") if known]
        return [*results, of("wer_original", model, list(zip(originals, written, strict=True)))]

    return score


def _word_count(text: str) -> int:
    return len(text.split())


def _texts(settings: EvalSettings, tokenizer: Any, count: int, context: int) -> list[Question]:
    """Texts to answer, evenly spread over the data."""
    pairs: list[tuple[str, str | None]]
    if holds_pairs(settings.data):
        pairs = [(row["input"], row["target"]) for row in read_records(settings.data)]
    else:
        pairs = [(document, None) for document in plain_documents(settings, "--suite")]
    count = min(count, len(pairs))
    asked = []
    for source, target in (pairs[i * len(pairs) // count] for i in range(count)):
        ids = torch.tensor([list(tokenizer(source, truncation=True, max_length=context)["input_ids"])])
        asked.append(Question(parts=({"input_ids": ids},), reference=target))
    return asked


def _recordings(subject: models.Subject, settings: EvalSettings, count: int) -> list[Question]:
    heard = islice(clips(subject, settings), count)
    return [Question(parts=clip.windows, reference=clip.words) for clip in heard]


def _read(model: Any, question: Question) -> list[int]:
    """The answer to a text, ids."""
    ids = question.parts[0]["input_ids"].to(model.device)
    written = greedy_ids(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokens=TOKENS)
    answer: list[int] = written[0].tolist()
    return answer


def _heard(model: Any, question: Question, batch: int) -> list[list[int]]:
    """The transcript of each window of a recording, ids."""
    starts = range(0, len(question.parts), batch)
    return [ids.tolist() for at in starts for ids in transcripts(model, question.parts[at : at + batch])]
