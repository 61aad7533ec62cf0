"""What models that listen are measured on: recordings, the words that are said in them, the original's transcripts.

Shape suffixes: T tokens of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from gqa_convert.calibrate.heard import features_of, transcripts, window_samples
from gqa_convert.calibrate.inputs import HEARD
from gqa_convert.calibrate.self_text import document_marks, tokens_read
from gqa_convert.data.sound import SOUND_FORMS, at_quiet, recordings
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.examples import Example
from gqa_convert.hf.loading import load_feature_extractor
from gqa_convert.modeling.shipping import TYPE_PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.evaluate.evaluation import EvalSettings

_CUT_SECONDS = 2.0
"""A window is filled to so much less than its length, so that no word stands at its very edge."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recording in windows: `windows` are a model's inputs, (1, ...) each; `words` are None if nobody wrote them."""

    name: str
    words: str | None
    windows: tuple[dict[str, Tensor], ...]


def clips(subject: models.Subject, settings: EvalSettings) -> Iterator[Clip]:
    """Read the recordings of an evaluation's data, in order; longer ones are cut where they are quietest.

    Raises:
        UsageError: if the data is no sound, or holds none.
        UnsupportedModelError: for families that listen in a way that is not known here.
        CheckpointError: if what turns sound into features is not in the folder.
        HubError: if a hub dataset cannot be read.
    """
    model_type = subject.source.model_type.removeprefix(TYPE_PREFIX)
    if model_type not in HEARD:
        raise UnsupportedModelError(
            f"{subject.name}: it listens, and of such models only {', '.join(HEARD)} can be measured."
        )
    extractor = load_feature_extractor(subject.folder, trust_remote_code=subject.source.trust_remote_code)
    rate = int(extractor.sampling_rate)
    seconds = window_samples(extractor) / rate
    silent = True
    try:
        for recording in recordings(settings.data, rate=rate, field=settings.field):
            pieces = at_quiet(recording.samples, rate=rate, seconds=max(seconds - _CUT_SECONDS, seconds / 2))
            windows = tuple(features_of(piece, extractor) for piece in pieces if len(piece))
            if windows:
                silent = False
                yield Clip(name=recording.name, words=recording.words, windows=windows)
    except UsageError as error:
        raise UsageError(f"--data {error}") from error
    if silent:
        raise UsageError(f"--data {settings.data}: holds no sound. Give {SOUND_FORMS}.")


def transcript_examples(subject: models.Subject, tokenizer: Any, settings: EvalSettings) -> list[Example]:
    """The windows of the recordings, and the original's own transcripts as what is to be predicted.

    Scored are the words and the token that ends them, not what stands before them: language, task, time stamps.

    Args:
        subject: the original, which is loaded here once more to write them.
        tokenizer: its tokenizer.
        settings: of the evaluation; at most `max_windows` windows are taken.

    Raises:
        GQAConvertError: as `clips`.
    """
    windows = (window for clip in clips(subject, settings) for window in clip.windows)
    heard = list(islice(windows, settings.max_windows))
    model = models.load(subject, dtype=settings.dtype, device=settings.device)
    ends = document_marks(model)[1]
    written = [
        answer
        for start in range(0, len(heard), settings.batch_size)
        for answer in transcripts(model, heard[start : start + settings.batch_size])
    ]
    examples = [_example(window, ids, ends, tokenizer) for window, ids in zip(heard, written, strict=True)]
    return sorted(examples, key=lambda example: len(example.targets))


def _example(window: dict[str, Tensor], answer_T: Tensor, ends: list[int], tokenizer: Any) -> Example:
    read = min(tokens_read(answer_T, ends), len(answer_T) - 1)
    targets_T = answer_T[1 : read + 1]
    special = torch.isin(targets_T, torch.tensor(tokenizer.all_special_ids))
    words = (~special).nonzero()
    first = int(words[0]) if len(words) else len(targets_T) - 1
    return Example(
        inputs={name: x[0] for name, x in window.items()} | {"decoder_input_ids": answer_T[:read]},
        targets=targets_T,
        scored=torch.arange(len(targets_T)) >= first,
        size=len(str(tokenizer.decode(targets_T, skip_special_tokens=True)).encode()),
    )
