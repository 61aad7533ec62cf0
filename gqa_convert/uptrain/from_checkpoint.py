"""A plain transformers folder from any checkpoint of a run, whichever engine saved it; on one process, without data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from gqa_convert.checkpoint.fingerprint import sampled_digest
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.staging import check_output
from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.hf.loading import Source, load_model
from gqa_convert.uptrain import parameters, zero
from gqa_convert.uptrain.checkpoints import MARKER, CheckpointStore, SavedCheckpoint, open_checkpoint
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.export import told_config, write_final
from gqa_convert.uptrain.resume import unusable
from gqa_convert.uptrain.state import has_average, load_average, load_training_state
from gqa_convert.uptrain.whole import trained_parameters

WEIGHTS = ("final", "trained", "averaged")
"""Which of a checkpoint's weights are wanted."""
_ATTENTION = "eager"
"""Nothing is computed: the implementation that every model and machine has will do."""


def export_checkpoint(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    model: str | None = None,
    weights: str = "final",
    force: bool = False,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Path, int]:
    """Write what a run had trained when it saved a checkpoint. The run itself is not touched.

    Args:
        run: a run's output, or one of its checkpoints.
        out: folder to make.
        step: of the checkpoint; the newest whole one by default.
        model: the converted model that the run started from, if it lies elsewhere now.
        weights: `trained`, `averaged` (see `averaging.decay`), or `final`: what the run would make its result of.
        force: replace an earlier result at `out`.
        trust_remote_code: allow the model folder's own code to run.
        tell: told of damaged checkpoints that are passed over.

    Returns:
        The folder, and the step of the checkpoint.

    Raises:
        UsageError: if there is no such checkpoint, it holds no average that was asked for, or nothing says what the run
            started from.
        CheckpointError: if the checkpoint is damaged, or the model is not the one that the run started from.
        OutputError: if the folder cannot be written.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights {weights!r}: choose one of {', '.join(WEIGHTS)}.")
    saved = _chosen(run, step, tell)
    state = saved.state()
    config = _config(saved, state)
    averaged = weights == "averaged" or (weights == "final" and _ends_averaged(config))
    if averaged and (state.get("averaged") is None or not has_average(saved.folder)):
        raise UsageError(f"{saved.folder}: holds no average of the weights (the run was without averaging.decay).")
    name = model or (config.model if config else None)
    if config is None or name is None:
        raise UsageError(f"{saved.folder}: was written by a version that did not keep the run's settings in it.")
    source = resolve_model(name)
    checkpoint = Checkpoint.open(source)
    if state["identity"].get("model_weights") != sampled_digest(checkpoint):
        raise CheckpointError(
            f"{source}: is not the model that the run started from (its weights differ). Give that one by --model."
        )
    check_output(out.absolute(), force=force, source=source, needed_bytes=checkpoint.total_bytes)
    plain = load_model(
        Source.of(checkpoint, trust_remote_code=trust_remote_code), dtype=torch.float32, attention=_ATTENTION
    )
    plain = parameters.choose_parameters(plain, config.train)
    _load(saved.folder, plain, averaged=averaged)
    plain = parameters.merged_model(plain)
    tensors = {name: value.detach() for name, value in plain.state_dict().items()}
    write_final(
        plain,
        tensors,
        source=source,
        target=out.absolute(),
        uptraining=_told(config, state),
        trust_remote_code=trust_remote_code,
        force=force,
    )
    return out, saved.step


def _ends_averaged(config: UptrainConfig | None) -> bool:
    return config is not None and config.averaging.decay is not None and config.averaging.final


def _chosen(run: Path, step: int | None, tell: Callable[[str], None]) -> SavedCheckpoint:
    if (run / MARKER).is_file():
        if step is not None:
            raise UsageError(f"{run}: is one checkpoint; give the run's folder with --step.")
        return open_checkpoint(run, fault=unusable)
    store = CheckpointStore(run / "checkpoints", keep=2)
    steps = store.steps()
    if not steps:
        raise UsageError(f"{run}: holds no checkpoints of a run. Give the output of `gqa uptrain`.")
    if step is None:
        saved = store.newest(tell, fault=unusable)
        if saved is None:
            raise CheckpointError(f"{run}: none of its checkpoints is whole.")
        return saved
    if step not in steps:
        raise UsageError(f"--step {step}: there are checkpoints of steps {', '.join(map(str, steps))}.")
    return open_checkpoint(store.path(step), fault=unusable)


def _config(saved: SavedCheckpoint, state: dict[str, Any]) -> UptrainConfig | None:
    if state.get("config") is None:
        return None
    try:
        return UptrainConfig.model_validate(state["config"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{saved.folder}: its settings cannot be used ({where}: {first['msg']}).") from error


def _load(folder: Path, plain: Any, *, averaged: bool) -> None:
    """Put a checkpoint's weights into the model; what was not trained stays as it is."""
    wrapped = nn.Module()
    wrapped.model = plain  # parameters have the names that they had in training
    if not (folder / zero.FOLDER).is_dir():
        load_training_state(folder, wrapped, None)
        if averaged:
            with torch.no_grad():
                load_average(folder, {name: value.detach() for name, value in trained_parameters(wrapped).items()})
        return
    named = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, value in zero.saved_weights(folder).items():
            if name not in named or named[name].shape != value.shape:
                raise CheckpointError(f"{folder}: {name} is no parameter of this model.")
            named[name].copy_(value)


def _told(config: UptrainConfig, state: dict[str, Any]) -> dict[str, Any]:
    """What `gqa_convert.json` says of the training so far."""
    return {
        "config": told_config(config),
        "steps": state["step"],
        "tokens": state.get("tokens"),
        "held_out_loss": state["losses"],
        "seconds": round(float(state["seconds"]), 1),
        "engine": state.get("engine"),
        "processes": state.get("processes"),
        "versions": state.get("versions"),
    }
