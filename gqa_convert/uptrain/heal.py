"""Healing: a converted model learns its original's predictions again, by its attention alone, on a little text.

What the closed forms and the refit of single layers leave behind is how the layers' errors add up. A short distillation
from the original mends that (KL of next-token predictions, no language-model loss: Minitron, Muralidharan et al. 2024,
arXiv 2407.14679; attention alone: MHA2MLA, Ji et al. 2025, arXiv 2502.14837). It is an ordinary uptraining run with
settings chosen for this start; `docs/healing.md` has what was measured.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.staging import check_output, staged_output
from gqa_convert.checkpoint.writer import write_text
from gqa_convert.conversion.recipe import SELF
from gqa_convert.data.reading import DEMO
from gqa_convert.errors import OutputError, UsageError

if TYPE_CHECKING:
    from gqa_convert.conversion.plan import ConvertPlan
    from gqa_convert.uptrain.config import UptrainConfig
    from gqa_convert.uptrain.forecast import Forecast
    from gqa_convert.uptrain.loop import UptrainResult

Tell = Callable[[str], None]

CONTEXT = 512
"""Tokens of a sequence, where the model reads as many."""
BATCH_TOKENS = 1024
PEAK = 6e-4
"""Peak learning rate."""
OWN_TOKENS = 131_072
"""Most tokens that the original writes; they are then met more than once."""
FULL_WIDTH = 1024
"""Above this hidden size the learning rate falls with the square root of the width, as that of the refit does."""
_SETTINGS = "heal.json"
_RUN = "uptrain.json"
_OWN_TEXT = "original-wrote.jsonl"


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """How a converted model is healed.

    Raises:
        UsageError: for values that mean nothing.
    """

    text: str = SELF
    """A file, a folder, a hub dataset, `demo` (this Python's own modules), or `self`: the original writes it."""
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
        if problems:
            raise UsageError(f"heal: {'; '.join(problems)}.")


@dataclass(frozen=True, kw_only=True)
class HealResult:
    """A healed model.

    Attributes:
        out: its folder.
        loss_before: held-out cross-entropy of the converted model, nats per token.
        loss_after: of the healed one.
        loss_original: of the original.
        tokens: trained on.
        seconds: spent in steps, over all legs of the run.
    """

    out: Path
    loss_before: float
    loss_after: float
    loss_original: float | None
    tokens: int
    seconds: float


def heal(
    converted: str | Path,
    original: str | Path,
    *,
    out: str | Path,
    options: HealOptions | None = None,
    work: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    tell: Tell | None = None,
) -> HealResult:
    """Heal a converted model, and write the result to a new folder.

    Interrupted, the same call goes on after the last checkpoint, to the same bits on the same machine.

    Args:
        converted: the converted folder; never written to.
        original: the model before conversion, a folder or hub id.
        out: the folder to write.
        options: see `HealOptions`.
        work: folder of the training run, kept; by default one beside `out`, removed at the end.
        force: replace an earlier model at `out`.
        trust_remote_code: allow the models' own Python code to run.
        quiet: show no progress.
        tell: told beforehand what it will take, and of long work.

    Raises:
        UsageError: if the two models are not a conversion and its original, or an earlier run in `work` was another.
        Preempted: when asked to stop, after saving.
        GQAConvertError: for anything wrong with text, models, or disk; nothing is left at `out` then.
    """
    from gqa_convert.checkpoint.hub import resolve_model
    from gqa_convert.uptrain.forecast import forecast
    from gqa_convert.uptrain.loop import uptrain

    chosen, target = options or HealOptions(), Path(out)
    source, teacher = resolve_model(str(converted)), resolve_model(str(original))
    needed = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    check_output(target, force=force, source=source, needed_bytes=needed)
    with heal_folder(target, work) as folder:
        config = settled(chosen, source, teacher, folder, trust_remote_code=trust_remote_code, tell=tell)
        if tell is not None:
            tell(told(forecast(config, source, teacher, tokens=chosen.tokens, processes=processes())))
        result = uptrain(config, quiet=quiet)
        _publish(result, target, source, force)
    return HealResult(
        out=target,
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        loss_original=result.reference_loss,
        tokens=result.tokens,
        seconds=result.seconds,
    )


def convert_and_heal(
    planned: ConvertPlan,
    *,
    options: HealOptions | None = None,
    work: str | Path | None = None,
    force: bool = False,
    flush: bool = True,
    verify: str = "structure",
    trust_remote_code: bool = False,
    quiet: bool = False,
    tell: Tell | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> HealResult:
    """Convert by a plan into a folder that is not kept, and heal that into the plan's target.

    Interrupted, the same call goes on: after the last layer that was refitted, or the last checkpoint of the training.

    Args:
        planned: the conversion; its `target` is where the healed model goes.
        options: of the healing.
        work: folder for solved layers, the converted model and the training run, kept; by default one beside the
            target, removed at the end.
        force: replace an earlier model at the target.
        flush: as for `gqa_convert.convert`.
        verify: as for `gqa_convert.convert`, of the converted model.
        trust_remote_code: allow the model's own Python code to run.
        quiet: show no progress of the training.
        tell: told beforehand what it will take, and of long work.
        on_bytes: as for `gqa_convert.convert`.
        on_layer: as for `gqa_convert.convert`.

    Raises:
        UsageError: if `work` holds another conversion.
        GQAConvertError: of the kind that fits; nothing is left at the target then.
    """
    from gqa_convert.conversion.execute import execute

    target = planned.target
    check_output(target, force=force, source=planned.checkpoint.folder, needed_bytes=planned.bytes_out)
    with heal_folder(target, work) as folder:
        converted = replace(planned, target=folder / "converted")
        if is_main() and not _is_there(converted):
            execute(
                converted,
                verify=verify,
                work=folder / "layers",
                flush=flush,
                on_bytes=on_bytes,
                on_layer=on_layer,
            )
        while not is_main() and not converted.target.is_dir():
            time.sleep(1.0)
        return heal(
            converted.target,
            planned.checkpoint.folder,
            out=target,
            options=options,
            work=folder,
            force=force,
            trust_remote_code=trust_remote_code,
            quiet=quiet,
            tell=tell,
        )


def _is_there(planned: ConvertPlan) -> bool:
    """Whether an interrupted run has carried this plan out already.

    Raises:
        UsageError: if it has carried out another one.
    """
    from gqa_convert.checkpoint.provenance import PROVENANCE
    from gqa_convert.conversion.execute import provenance

    record = planned.target / PROVENANCE
    if not record.is_file():
        return False
    before, now = json.loads(record.read_text(encoding="utf-8")), provenance(planned)
    if any(before.get(key) != json.loads(json.dumps(now[key])) for key in ("source", "conversion")):
        raise UsageError(
            f"{planned.target}: an interrupted run converted another model there, or otherwise. Give the same options, "
            "another --work, or remove the folder."
        )
    return True


def foreseen(
    converted: str | Path, original: str | Path, options: HealOptions, *, trust_remote_code: bool = False
) -> Forecast:
    """What healing would take on this machine; reads headers and no weights.

    Raises:
        GQAConvertError: if one of the models is no checkpoint, or named text is not there.
    """
    from gqa_convert.checkpoint.hub import resolve_model
    from gqa_convert.uptrain.forecast import forecast
    from gqa_convert.uptrain.read_config import parse_config

    source, teacher = resolve_model(str(converted)), resolve_model(str(original))
    values = heal_settings(options, source, teacher, Path(), trust_remote_code=trust_remote_code)
    config = parse_config(values, where="heal")
    return forecast(config, source, teacher, tokens=options.tokens, processes=processes())


@contextmanager
def heal_folder(target: Path, work: str | Path | None) -> Iterator[Path]:
    """Yield the folder of the run: the user's, kept, or one beside the target that is removed when all went well."""
    folder = target.absolute().with_name(f".{target.name}.heal") if work is None else Path(work).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    yield folder
    if work is None and is_main():
        shutil.rmtree(folder, ignore_errors=True)


def is_main() -> bool:
    """Whether this is the first process of a launcher's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def told(cost: Forecast) -> str:
    """A forecast in one line."""
    return (
        f"{cost.trained:,} parameters are trained; {cost.flops:.2g} operations, about {cost.hours:.2g} hours on this "
        f"machine, {cost.memory_bytes / 1e9:.1f} GB of memory"
    )


def _publish(result: UptrainResult, target: Path, source: Path, force: bool) -> None:
    if not is_main():
        return
    needed = sum(path.stat().st_size for path in result.folder.rglob("*") if path.is_file())
    with staged_output(target, force=force, source=source, needed_bytes=needed) as stage:
        shutil.copytree(result.folder, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))


def settled(
    options: HealOptions,
    source: Path,
    teacher: Path,
    folder: Path,
    *,
    trust_remote_code: bool = False,
    tell: Tell | None = None,
) -> UptrainConfig:
    """The uptraining that these options come to; an interrupted run's own, if `folder` holds one.

    Raises:
        UsageError: if `folder` holds a run with other options or models.
    """
    from gqa_convert.uptrain.read_config import load_config, parse_config

    say = tell or (lambda _: None)
    wanted = {"options": asdict(options), "converted": str(source.resolve()), "original": str(teacher.resolve())}
    kept = folder / _SETTINGS
    while not is_main() and not kept.is_file():
        time.sleep(1.0)  # the first process writes it, perhaps after the original has written its text
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        changed = [name for name, value in wanted.items() if before.get(name) != value]
        if changed:
            raise UsageError(
                f"{folder}: holds an interrupted healing with other {' and '.join(changed)}. Give the same ones, "
                "another --work, or remove the folder."
            )
        return load_config(folder / _RUN)
    if options.text == SELF and is_main():
        write_own_text(options, teacher, folder / _OWN_TEXT, trust_remote_code=trust_remote_code, tell=say)
    values = heal_settings(options, source, teacher, folder, trust_remote_code=trust_remote_code)
    config = parse_config(values, where="heal")
    if is_main():
        _write_whole(folder / _RUN, json.dumps(values, indent=1) + "\n")
        _write_whole(kept, json.dumps(wanted, indent=1) + "\n")
    return config


def heal_settings(
    options: HealOptions, source: Path, teacher: Path, folder: Path, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The uptraining as `gqa uptrain` would read it from a file."""
    from gqa_convert.hf import api
    from gqa_convert.hf.loading import max_positions
    from gqa_convert.uptrain.forecast import training_precision

    model = api.load_config(source, trust_remote_code=trust_remote_code)
    text = model.get_text_config(decoder=True)
    longest = max_positions(model)
    context = options.context or min(CONTEXT, longest or CONTEXT)
    encodes = bool(getattr(model, "is_encoder_decoder", False))
    sequences = max(1, BATCH_TOKENS // context)
    batch_tokens = sequences * context
    tokens = max(options.tokens, batch_tokens)
    data: dict[str, Any] = {"source": _source(options.text, folder), "context": context}
    if options.held_out is None:
        data["held_out_fraction"] = 0.02
    else:
        data["held_out_source"] = _source(options.held_out, folder, held_out=True)
    return {
        "model": str(source),
        "output": str(folder / "run"),
        "budget": {"tokens": tokens},
        "data": data,
        "objective": {
            "kind": "span_corruption" if encodes else "causal_lm",
            "distillation": {"teacher": str(teacher)},
            "loss_chunk": 512,
        },
        "schedule": {
            "kind": "cosine",
            "peak": options.rate or heal_rate(int(getattr(text, "hidden_size", FULL_WIDTH))),
            "final_fraction": 0.0,
            "warmup_fraction": 0.1,
        },
        "train": {
            "batch_sequences": sequences,
            "micro_batch": sequences,
            "precision": training_precision(),
            "parameters": "attention",
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


def _source(text: str, folder: Path, *, held_out: bool = False) -> str | dict[str, Any]:
    """What the uptraining is told of a text: `self` and `demo` are read from where they are."""
    if text == SELF:
        return {"kind": "jsonl", "paths": [str(folder / _OWN_TEXT)]}
    if text == DEMO and not Path(text).exists():
        which = "held_out_texts" if held_out else "training_texts"
        return {"kind": "python", "paths": [f"gqa_convert.data.stdlib:{which}"]}
    return text


def heal_rate(width: int) -> float:
    """Peak learning rate for a model of this hidden size."""
    return PEAK * min(1.0, math.sqrt(FULL_WIDTH / width))


def write_own_text(options: HealOptions, teacher: Path, path: Path, *, trust_remote_code: bool, tell: Tell) -> None:
    """Let the original write the text, as many tokens as are trained on but at most `OWN_TOKENS`, one window a line.

    Raises:
        UnsupportedModelError: for an encoder-decoder, which answers and does not begin.
        CheckpointError: if its tokenizer cannot be loaded.
    """
    if path.is_file():
        return
    from gqa_convert.calibrate.self_text import self_tokens
    from gqa_convert.hf.loading import Source, max_positions

    source = Source.open(teacher, trust_remote_code=trust_remote_code)
    length = options.context or min(CONTEXT, max_positions(source.config) or CONTEXT)
    count = max(64, min(options.tokens, OWN_TOKENS) // length)
    tell(f"the original writes {count * length:,} tokens to be healed on")
    ids_NT = self_tokens(source, sequences=count, length=length, seed=options.seed)
    tokenizer = source.tokenizer()
    texts = tokenizer.batch_decode(ids_NT[:, 1:])
    _write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is whole under its name or not there."""
    beside = path.with_name(f"{path.name}.part")
    try:
        write_text(beside, text)
        beside.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder}: cannot be written to ({error.strerror or error}). Choose another --work.")
