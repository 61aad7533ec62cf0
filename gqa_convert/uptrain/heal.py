"""Healing: a converted model learns its original's predictions again, by its attention alone, on a little text.

What the closed forms and the refit of single layers leave behind is how the layers' errors add up. A short distillation
from the original mends that (KL of next-token predictions, no language-model loss: Minitron, Muralidharan et al. 2024,
arXiv 2407.14679; attention alone: MHA2MLA, Ji et al. 2025, arXiv 2502.14837). It is an ordinary uptraining run with
settings chosen for this start; `docs/healing.md` has what was measured.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.staging import check_output, staged_output
from gqa_convert.errors import UsageError
from gqa_convert.outcome import Outcome
from gqa_convert.uptrain.heal_folder import Tell, heal_folder, is_main, settled
from gqa_convert.uptrain.heal_settings import HealOptions, heal_rate, heal_settings, processes

if TYPE_CHECKING:
    from gqa_convert.conversion.plan import ConvertPlan
    from gqa_convert.uptrain.forecast import Forecast
    from gqa_convert.uptrain.loop import UptrainResult

__all__ = [
    "HealOptions",
    "HealResult",
    "convert_and_heal",
    "foreseen",
    "heal",
    "heal_rate",
    "heal_settings",
    "is_main",
    "told",
]


@dataclass(frozen=True, kw_only=True)
class HealResult(Outcome):
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

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self) | {"out": str(self.out)}


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
            cost = forecast(config, source, teacher, tokens=chosen.tokens, processes=processes())
            tell(told(cost, chosen.tokens))
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


def _publish(result: UptrainResult, target: Path, source: Path, force: bool) -> None:
    if not is_main():
        return
    needed = sum(path.stat().st_size for path in result.folder.rglob("*") if path.is_file())
    with staged_output(target, force=force, source=source, needed_bytes=needed) as stage:
        shutil.copytree(result.folder, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))


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


def told(cost: Forecast, tokens: int) -> str:
    """A forecast of a run over so many tokens in one line."""
    return (
        f"{cost.trained:,} parameters are trained on {tokens:,} tokens; {cost.flops:.2g} operations, "
        f"about {cost.hours:.2g} hours on this machine, {cost.memory_bytes / 1e9:.1f} GB of memory"
    )
