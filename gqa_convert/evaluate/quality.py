"""What a conversion cost, measured right after it: a short held-out sample scored by the source and by the result.

Done without being asked only where it is nearly free; elsewhere what it would take is said, and nothing is run. What
runs models is imported when it is needed: most conversions end without.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.budget.machine import free_memory, matmul_rate
from gqa_convert.hf.loading import pick_device

if TYPE_CHECKING:
    from gqa_convert.conversion.execute import ConvertResult
    from gqa_convert.conversion.plan import ConvertPlan

SECONDS = 20.0
"""Longest measurement that is made unasked, as estimated."""
MEMORY_SHARE = 0.5
"""Share of the free memory that it may take, as estimated."""

_WINDOWS, _LENGTH = 12, 64  # of text that the source writes: many short ones cost the fewest steps
_DATA_WINDOWS, _DATA_CONTEXT = 8, 256  # of text that the user names
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")

_VERDICTS = (
    (0.02, "as good as the source on this sample"),
    (0.1, "close to the source"),
    (0.3, "clearly worse than the source: train it further before it is used"),
    (math.inf, "not usable as it is: train it further, or merge better"),
)
"""Rise of the loss in nats per token up to which each verdict holds."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What was measured: nats per token; `reason` says why nothing was, and the figures are None then."""

    sample: str = ""
    tokens: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    kl: float | None = None
    agreement: float | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def rise(self) -> float | None:
        """Nats per token by which the loss went up; None if it was not measured."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before

    @property
    def verdict(self) -> str:
        """The figures in words."""
        if self.rise is None:
            return f"not measured ({self.reason})"
        return next(words for most, words in _VERDICTS if self.rise <= most)

    @property
    def usable(self) -> bool | None:
        """Whether the verdict asks for no more training; None if it was not measured."""
        return None if self.rise is None else self.rise <= _VERDICTS[1][0]

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values, with the perplexities that follow from them."""
        perplexities = {
            name.replace("loss", "perplexity"): None if value is None else math.exp(min(value, 700.0))
            for name, value in (("loss_before", self.loss_before), ("loss_after", self.loss_after))
        }
        return asdict(self) | perplexities | {"verdict": self.verdict}


def recorded_quality(
    result: ConvertResult, *, data: str | None = None, insist: bool = False, device: str = "auto"
) -> tuple[ConvertResult, Quality]:
    """Measure a finished conversion, and write the figures into its result and its card.

    Args:
        result: the conversion.
        data: as for `measure_conversion`.
        insist: as for `measure_conversion`.
        device: as for `measure_conversion`.

    Raises:
        GQAConvertError: as `measure_conversion`.
    """
    from gqa_convert.conversion.card import refresh_card

    quality = measure_conversion(result.plan, result.out, data=data, insist=insist, device=device)
    if quality.rise is not None:
        refresh_card(result.out, quality.to_json())
    return replace(result, quality=quality.to_json()), quality


def measure_conversion(
    plan: ConvertPlan,
    out: Path,
    *,
    data: str | None = None,
    insist: bool = False,
    seconds: float = SECONDS,
    device: str = "auto",
) -> Quality:
    """Score the source and its conversion on a held-out sample.

    Args:
        plan: the conversion that was made.
        out: the folder it wrote.
        data: text to score, named as for `gqa eval`; by default text that the source writes (decoder-only models).
        insist: measure whatever it takes.
        seconds: longest measurement to make otherwise, as estimated.
        device: where models run.

    Returns:
        The figures, or the reason why there are none.

    Raises:
        GQAConvertError: if `data` cannot be read or a model cannot be loaded.
    """
    if not plan.merges_heads and not plan.recipe.uses_blocks:
        return Quality(reason="nothing was merged")
    if data is None and getattr(plan.anatomy.config, "is_encoder_decoder", False):
        from gqa_convert.calibrate.inputs import listens

        if listens(plan.anatomy.source):
            return Quality(reason="it listens: name recordings with --data")
        return Quality(reason="an encoder-decoder writes no text from nothing: name some with --data")
    if not any((plan.source / name).is_file() for name in _TOKENIZER_FILES):
        return Quality(reason="the folder has no tokenizer")
    if not insist:
        reason = _too_dear(plan, seconds, device)
        if reason:
            return Quality(reason=reason)
    started = time.perf_counter()
    try:
        if data is None:
            return _on_own_text(plan, out, started, device)
        return _on_data(plan, out, data, started, device)
    except Exception as error:
        if insist:
            raise
        # The conversion stands, checked as asked: what nobody asked for must not make it look failed.
        line = (str(error).strip().splitlines() or [""])[0][:160]
        return Quality(reason=f"the models could not be run ({type(error).__name__}: {line})")


def _on_own_text(plan: ConvertPlan, out: Path, started: float, where: str) -> Quality:
    from gqa_convert.calibrate.self_text import self_tokens
    from gqa_convert.evaluate import examples as ex
    from gqa_convert.evaluate import models
    from gqa_convert.evaluate.scoring import score
    from gqa_convert.evaluate.text import TokenStream, windows

    device = str(pick_device(where))
    ids = self_tokens(plan.anatomy.source.as_stored, sequences=_WINDOWS, length=_LENGTH, device=device, seed=1)
    subjects = [models.subject(str(folder), trust_remote_code=plan.trust_remote_code) for folder in (plan.source, out)]
    before, after = (models.load(subject, device=where) for subject in subjects)
    stream = TokenStream(ids.flatten().tolist(), [0] * ids.numel())
    sample = ex.causal_examples(stream, windows(len(stream.ids), context=_LENGTH, stride=_LENGTH))
    first, second, _ = score(before, after, sample)
    assert second is not None
    return Quality(
        sample="text that the source wrote",
        tokens=sum(first.tokens),
        loss_before=first.mean("loss"),
        loss_after=second.mean("loss"),
        kl=second.mean("kl"),
        agreement=second.mean("top1_agreement"),
        seconds=time.perf_counter() - started,
    )


def _on_data(plan: ConvertPlan, out: Path, data: str, started: float, device: str) -> Quality:
    from gqa_convert.evaluate import models
    from gqa_convert.evaluate.evaluation import EvalSettings, evaluate

    longest = models.subject(str(plan.source), trust_remote_code=plan.trust_remote_code).max_context or _DATA_CONTEXT
    settings = EvalSettings(
        data=data,
        context=min(longest, _DATA_CONTEXT),
        max_windows=_DATA_WINDOWS,
        device=device,
        trust_remote_code=plan.trust_remote_code,
    )
    evaluation = evaluate(plan.source, [out], settings)
    (comparison,) = evaluation.converted
    return Quality(
        sample=evaluation.data,
        tokens=evaluation.tokens,
        loss_before=evaluation.base.loss,
        loss_after=comparison.model.loss,
        kl=comparison.kl,
        agreement=comparison.top1_agreement,
        seconds=time.perf_counter() - started,
    )


def _too_dear(plan: ConvertPlan, most_seconds: float, device: str) -> str:
    """Why a measurement is not made unasked; empty if it may be."""
    memory, free = 4 * (plan.parameters_in + plan.parameters_out), free_memory()
    if pick_device(device).type == "cpu" and memory > MEMORY_SHARE * free:
        return f"both models take {memory / 2**30:.1f} GiB in float32, of {free / 2**30:.1f} GiB that are free"
    seconds = estimated_seconds(plan.parameters_in)
    if seconds > most_seconds:
        return f"it would take about {seconds:,.0f} s here"
    return ""


def estimated_seconds(parameters: int) -> float:
    """About how long measuring on the model's own text takes here, after a trial of the processor (or GPU)."""
    rate = matmul_rate()
    tokens = _WINDOWS * _LENGTH
    # Small products reach perhaps a third of that rate; writing passes over all weights once per step besides.
    return 3 * (3 * 2 * parameters * tokens / rate) + _LENGTH * 4 * parameters / 2e10 + 8 * 4 * parameters / 1e9
