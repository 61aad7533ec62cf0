"""Calibration on sound, for encoder-decoders that listen: the features of recordings and the model's own transcripts.

Shape suffixes: N windows, T tokens of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from gqa_convert.calibrate.self_text import Progress, document_marks, tokens_read
from gqa_convert.calibrate.tokens import shorter
from gqa_convert.data.sound import sounds
from gqa_convert.errors import UsageError
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source, load_model, max_positions

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.calibrate.store import LayerStore
    from gqa_convert.data.sound import Samples

_AT_ONCE = 8
"""Windows that are written down together; their transcripts are kept together too."""
_SECONDS = 30  # of a window, where the extractor names no length of its own
_LEAST_SECONDS = 0.5  # shorter ends of recordings say too little
_TOKENS_A_SECOND, _LEAST_TOKENS = 8, 16  # longest transcript of a window; people say three or four words a second


def recordings(data: str, extractor: Any, *, windows: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Read recordings and cut them into windows such as the model is given: 30 seconds for Whisper, the last padded.

    Args:
        data: a file, a folder or a hub dataset; see `gqa_convert.data.sound.sounds`.
        extractor: the model's (`gqa_convert.hf.loading.load_feature_extractor`).
        windows: wanted in all; a smaller source gives fewer.
        seed: for the order of recordings.

    Returns:
        The extractor's outputs, float32, (1, ...) each: an entry a window, in the order read.

    Raises:
        UsageError: if there is no recording of half a second.
        HubError: if a hub dataset cannot be read.
    """
    rate = int(extractor.sampling_rate)
    samples = window_samples(extractor)
    heard: list[dict[str, Tensor]] = []
    for recording in sounds(data, rate=rate, seed=seed):
        for window in _windows(recording, samples, round(_LEAST_SECONDS * rate)):
            heard.append(features_of(window, extractor))
            if len(heard) == windows:
                return heard
    if not heard:
        raise UsageError(f"{data}: no recording is as long as {_LEAST_SECONDS} s. Use other sound.")
    return heard


def window_samples(extractor: Any) -> int:
    """Samples of the window that a model is given at once."""
    return int(getattr(extractor, "n_samples", 0) or _SECONDS * int(extractor.sampling_rate))


def features_of(window: Samples, extractor: Any) -> dict[str, Tensor]:
    """What a model reads of a window of sound, (1, ...) each, float32, padded to a whole window."""
    with api.quiet():
        features = extractor(window, sampling_rate=int(extractor.sampling_rate), return_tensors="pt")
    return {name: tensor for name, tensor in features.items() if tensor.is_floating_point()}


def _windows(recording: Samples, samples: int, least: int) -> Iterator[Samples]:
    for start in range(0, len(recording), samples):
        window = recording[start : start + samples]
        if len(window) >= least:
            yield np.ascontiguousarray(window)


def own_transcripts(
    source: Source,
    heard: Sequence[dict[str, Tensor]],
    *,
    store: LayerStore | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Tensor]]:
    """Let a model that listens write down each window, and return both sides as calibration inputs.

    Transcripts are those of its own `generate`, greedy, with all that it puts before them. They are cut to few lengths,
    and what has one shape comes back together.

    Args:
        source: the checkpoint.
        heard: features of windows, as `recordings` gives them.
        store: where transcripts are kept as they come, a few windows together, and found again.
        device: where to run.
        progress: called with the number of windows transcribed since the last call.

    Returns:
        The features by name, (N, ...), and `decoder_input_ids` (N, T), the latter starting with the start token.
    """
    import torch

    writer: _Writer | None = None
    by_shape: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
    for number, start in enumerate(range(0, len(heard), _AT_ONCE)):
        windows = heard[start : start + _AT_ONCE]
        kept = None if store is None else store.read(number)
        if kept is None:
            writer = writer or _Writer(source, device)
            answers = writer.write(windows)
            if store is not None:
                store.write(number, {str(i): answer for i, answer in enumerate(answers)}, {})
        else:
            answers = [kept[0][str(i)] for i in range(len(windows))]
        for window, read in zip(windows, answers, strict=True):
            shape = (len(read), *(tuple(tensor.shape) for tensor in window.values()))
            by_shape.setdefault(shape, []).append({**window, "decoder_input_ids": read[None]})
        if progress:
            progress(len(windows))
    return [
        {name: torch.cat([window[name] for window in by_shape[shape]]) for name in by_shape[shape][0]}
        for shape in sorted(by_shape)
    ]


class _Writer:
    """The model, loaded to write transcripts."""

    def __init__(self, source: Source, device: str) -> None:
        import torch

        self.model = load_model(source, device=device, dtype=torch.float32 if device == "cpu" else "auto")

    def write(self, windows: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """What the decoder reads to write down each window, ids (T,), cut to few lengths."""
        ends = document_marks(self.model)[1]
        answers = transcripts(self.model, windows)
        return [answer[: shorter(tokens_read(answer, ends))].clone() for answer in answers]


def transcripts(model: Any, windows: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Let a loaded model write down windows, greedily, by its own `generate` and with all that it puts before them.

    Args:
        model: one that listens.
        windows: features as `recordings` gives them; those of one shape that follow each other are written together.

    Returns:
        Ids (T,) of each window, from the decoder's start token on; behind the token that ends one may be padding.
    """
    import inspect

    import torch

    begin = document_marks(model)[0]
    assert begin is not None
    whole = "force_unique_generate_call" in inspect.signature(model.generate).parameters
    choices: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": _longest(model.config)}
    choices |= {"force_unique_generate_call": True} if whole else {}  # Whisper's own leaves out its beginning
    answers: list[Tensor] = []
    for _, alike in groupby(windows, key=lambda window: [tuple(tensor.shape) for tensor in window.values()]):
        parts = list(alike)
        given = {name: torch.cat([part[name] for part in parts]).to(model.device, model.dtype) for name in parts[0]}
        with torch.no_grad(), api.quiet():
            written = model.generate(**given, **choices)
        for answer in written.cpu():
            if int(answer[0]) != begin:
                answer = torch.cat([torch.tensor([begin]), answer])
            answers.append(answer)
    return answers


def _longest(config: Any) -> int:
    most = _SECONDS * _TOKENS_A_SECOND
    return max(_LEAST_TOKENS, min(most, (max_positions(config) or most) // 2))
