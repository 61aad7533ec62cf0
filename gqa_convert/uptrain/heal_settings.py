"""What healing trains, on what and for how long: the uptraining run that a user's few options come to."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gqa_convert.conversion.recipe import SELF
from gqa_convert.data.reading import DEMO
from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from gqa_convert.hf.loading import Source

CONTEXT = 512
"""Tokens of a sequence, where the model reads as many."""
SEQUENCES = 2
"""Of a step, or one for each process. On the embedded model more and smaller steps came closer on the same tokens."""
RATE_TIMES_WIDTH = 0.9
"""Peak learning rate times hidden size; `docs/healing.md` has the trials."""
ENCODER_DECODER_RATE = 3e-4
"""Peak learning rate of encoder-decoders, beside each matrix's own size: a T5's weights of queries are a tenth of its
others, and steps that suit the one harm the other; `docs/healing.md` has the trials."""
MOST = 4e-3
"""Highest peak learning rate."""
HIDDEN_WEIGHT = 10.0
"""Weight of the distance between both models' hidden states (1 - cosine, mean over layers) beside the KL."""
OUTSIDE_ATTENTION = 0.3
"""Share of the rate for what is not attention, where all parameters are trained."""
OWN_TOKENS = 131_072
"""Most tokens that the original writes; they are then met more than once."""
ANSWERED_TOKENS = 262_144
"""Most tokens of text that an encoder-decoder answers."""
HELD_OUT = 0.02
"""Share of the documents that are measured on and not trained on."""
MOST_COPIED = 20_000
"""Documents of each source that passages are taken from."""
USUAL_WIDTH = 1024
"""Hidden size that is assumed where a configuration states none."""
OWN_TEXT, OWN_ANSWERS = "original-wrote.jsonl", "original-answered.jsonl"
"""Names of the files, in the run's folder, that hold what the original wrote."""
COPIES = "copies.jsonl"
"""And of the one with passages that come back."""


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """How a converted model is healed.

    Raises:
        UsageError: for values that mean nothing.
    """

    text: str | tuple[str, ...] = SELF
    """A file, a folder, a hub dataset, `demo` (this Python's own modules), or `self`: the original writes it. Several
    are mixed, evenly or by weight: `a.jsonl=0.7`, `b.jsonl=0.3`."""
    held_out: str | None = None
    """Text to measure on; by default a fiftieth of the documents of `text`, which is then not trained on."""
    tokens: int = 500_000
    """Tokens to train on at most."""
    until: float | None = None
    """Stop as soon as the held-out loss is within so many nats per token of the original's."""
    rate: float | None = None
    """Peak learning rate; None for a rule by width."""
    context: int | None = None
    """Tokens of a sequence; None for 512, or what the model reads."""
    parameters: Literal["attention", "all"] = "attention"
    """What is trained; everything outside attention at a share of the rate, see `OUTSIDE_ATTENTION`."""
    answers: bool = False
    """Of an encoder-decoder: the original answers the text first, and its answers are what is trained on."""
    copies: float = 0.0
    """Share of the tokens that are passages of the text which come back, and lists whose lines do: a converted model
    copies badly, and natural text hardly teaches it."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.tokens < 1:
            problems.append(f"tokens={self.tokens}: must be at least 1")
        if self.until is not None and self.until <= 0:
            problems.append(f"until={self.until}: must be above 0")
        if self.rate is not None and not 0 < self.rate < 1:
            problems.append(f"rate={self.rate}: must lie between 0 and 1")
        if self.context is not None and self.context < 2:
            problems.append(f"context={self.context}: must be at least 2")
        if self.parameters not in ("attention", "all"):
            problems.append(f"parameters={self.parameters!r}: attention or all")
        if self.answers and (not isinstance(self.text, str) or self.text == SELF):
            problems.append("answers: needs one text to answer")
        if not 0 <= self.copies < 1:
            problems.append(f"copies={self.copies}: must be at least 0 and below 1")
        if self.copies and self.answers:
            problems.append("copies: an encoder-decoder that learns answers copies nothing")
        if problems:
            raise UsageError(f"heal: {'; '.join(problems)}.")


def heal_settings(
    options: HealOptions, source: Path, teacher: Path, folder: Path, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The uptraining as `gqa uptrain` would read it from a file."""
    from gqa_convert.hf.loading import Source
    from gqa_convert.uptrain.forecast import training_precision

    opened = Source.open(source, trust_remote_code=trust_remote_code)
    model = opened.config
    text = model.get_text_config(decoder=True)
    width = int(getattr(text, "hidden_size", None) or USUAL_WIDTH)
    context = sequence_length(options, model)
    precision = training_precision()
    quick = "float32" if precision == "float32" else "bfloat16"  # where bfloat16 is slow, it is slow everywhere
    encodes = bool(getattr(model, "is_encoder_decoder", False))
    if options.answers and not encodes:
        raise UsageError(f"heal: answers: a {model.model_type} carries on what it reads. Leave it out.")
    kind = "causal_lm"
    if encodes:
        kind = "text_to_text" if options.answers or _holds_answers(options.text) else "span_corruption"
    micro_batch = -(-SEQUENCES // processes())
    batch_tokens = micro_batch * processes() * context
    tokens = max(options.tokens, batch_tokens)
    data: dict[str, Any] = {**_sources(options, folder), "context": context}
    if options.answers:
        data["source"] = {"kind": "jsonl", "paths": [str(folder / OWN_ANSWERS)]}
    if options.held_out is None:
        data["held_out_fraction"] = HELD_OUT
    else:
        data["held_out_source"] = _source(options.held_out, folder, held_out=True)
    return {
        "model": str(source),
        "output": str(folder / "run"),
        "budget": {"tokens": tokens},
        "data": data,
        "objective": {
            "kind": kind,
            "distillation": {"teacher": str(teacher), "hidden_weight": HIDDEN_WEIGHT, "dtype": quick},
        },
        "optimizer": {
            "kind": heal_optimizer(),
            "outside_attention": OUTSIDE_ATTENTION,
            "muon_dtype": quick,
            "relative": encodes,
            "per_head": _by_heads(opened, source, tokens=batch_tokens, context=context),
        },
        "schedule": {
            "kind": "linear",
            "peak": options.rate or (ENCODER_DECODER_RATE if encodes else heal_rate(width)),
            "final_fraction": 0.0,
            "warmup_fraction": 0.1,
        },
        "train": {
            "batch_sequences": micro_batch * processes(),
            "micro_batch": micro_batch,
            "precision": precision,
            "parameters": options.parameters,
            "dropout": 0.0,
            "seed": options.seed,
        },
        "checkpoints": {"every_minutes": 10.0},
        "evaluation": {
            "every_tokens": max(batch_tokens, tokens // 10),
            "tokens": 8192,
            "target": options.until,
        },
        "trust_remote_code": trust_remote_code,
    }


def sequence_length(options: HealOptions, config: Any) -> int:
    """Tokens of a sequence: those that were asked for, or 512 where the model reads as many."""
    from gqa_convert.hf.loading import max_positions

    return options.context or min(CONTEXT, max_positions(config) or CONTEXT)


def weighted_texts(text: str | tuple[str, ...]) -> list[tuple[str, float]]:
    """What to heal on, each with its weight.

    Raises:
        UsageError: for a weight that is none.
    """
    if isinstance(text, str):
        return [(text, 1.0)]
    named = []
    for entry in text:
        name, equals, weight = entry.rpartition("=")
        if not equals or Path(entry).exists():
            named.append((entry, 1.0))
            continue
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not name or not 0 < share < math.inf:
            raise UsageError(f"--text {entry}: write a weight above 0 behind the last `=`, as in {name or 'DATA'}=0.7.")
        named.append((name, share))
    return named


def _sources(options: HealOptions, folder: Path) -> dict[str, Any]:
    named = weighted_texts(options.text)
    if len(named) == 1 and not options.copies:
        return {"source": _source(named[0][0], folder)}
    sources = [{"source": _source(name, folder), "weight": weight} for name, weight in named]
    if options.copies:
        weight = options.copies / (1 - options.copies) * sum(weight for _, weight in named)
        sources.append({"source": {"kind": "jsonl", "paths": [str(folder / COPIES)]}, "weight": weight})
    return {"sources": sources}


def _source(text: str, folder: Path, *, held_out: bool = False) -> str | dict[str, Any]:
    """What the uptraining is told of a text: `self` and `demo` are read from where they are."""
    if text == SELF:
        return {"kind": "jsonl", "paths": [str(folder / OWN_TEXT)]}
    if text == DEMO and not Path(text).exists():
        which = "held_out_texts" if held_out else "training_texts"
        return {"kind": "python", "paths": [f"gqa_convert.data.stdlib:{which}"]}
    return text


def _by_heads(opened: Source, folder: Path, *, tokens: int, context: int) -> bool:
    """Whether Muon's products over whole matrices of attention would outgrow the model's own in a step."""
    from gqa_convert.budget.shape import shape_of_folder
    from gqa_convert.budget.solving import muon_flops
    from gqa_convert.uptrain.model import attention_linears

    parts = attention_linears(opened.meta_model).values()
    shapes = [tuple(parameter.shape) for part in parts for parameter in part.parameters()]
    return muon_flops(shapes) > tokens * shape_of_folder(folder).training_flops_per_token(context)


def _holds_answers(text: str | tuple[str, ...]) -> bool:
    """Whether the rows of a named text are texts and their answers."""
    from gqa_convert.data.conversations import Conversation
    from gqa_convert.data.documents import open_corpus
    from gqa_convert.data.named import source_named

    name = weighted_texts(text)[0][0]
    named = Path(name).exists() or name not in (SELF, DEMO)
    return named and isinstance(open_corpus(source_named(name)).first(), Conversation)


def processes() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def heal_rate(width: int) -> float:
    """Peak learning rate for a model of this hidden size."""
    return min(MOST, RATE_TIMES_WIDTH / width)


def heal_optimizer() -> str:
    """Muon where it can be had: ZeRO-3 cuts up the matrices it needs."""
    return "adamw" if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" else "muon"
