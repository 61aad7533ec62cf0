"""The result: again a plain transformers folder, complete with what came along with the converted model.

Weights are written by transformers itself under the keys of the source; config.json stays the source's own text, with
both spellings of rotary settings and dtype, since readers of either kind fall back to defaults without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_convert.checkpoint.config_json import edit_json
from gqa_convert.checkpoint.contents import tensor_digest
from gqa_convert.checkpoint.dtypes import FLOATS, torch_dtype
from gqa_convert.checkpoint.ownership import is_signed
from gqa_convert.checkpoint.provenance import PROVENANCE, source_identity, versions, write_provenance
from gqa_convert.checkpoint.reader import CONFIG, Checkpoint
from gqa_convert.checkpoint.side_files import copy_side_file
from gqa_convert.checkpoint.staging import check_output, staged_output
from gqa_convert.checkpoint.writer import write_text
from gqa_convert.conversion.card import read_card, write_card
from gqa_convert.errors import VerificationError
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source
from gqa_convert.uptrain import parameters
from gqa_convert.uptrain.build import Parts
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.config_data import SourceSection
from gqa_convert.uptrain.plan import UptrainPlan
from gqa_convert.uptrain.source_keys import restore_keys
from gqa_convert.uptrain.state import gather_weights, is_sharded
from gqa_convert.uptrain.streamed import StreamedWeights
from gqa_convert.uptrain.whole import plain_name

_OLD_ROTARY = ("rope_theta", "partial_rotary_factor")


def write_final(
    model: Any,
    weights: dict[str, Tensor] | StreamedWeights,
    *,
    source: Path,
    target: Path,
    uptraining: dict[str, Any],
    trust_remote_code: bool = False,
    force: bool = True,
) -> None:
    """Write the trained model, atomically.

    Args:
        model: the transformers model, for its keys and configuration.
        weights: its state dict, on the CPU; or what writes it a tensor at a time.
        source: the converted folder that training started from.
        target: folder to make.
        uptraining: what `gqa_convert.json` says under that name; beside it, as `tensors`, stands a digest of every
            tensor, by which damage can be told later.
        trust_remote_code: whether the folder's own code may run.
        force: replace an earlier one at `target`.

    Raises:
        OutputError: if it cannot be written.
        VerificationError: if keys or shapes are not those of the source.
    """
    origin = Source.open(source, trust_remote_code=trust_remote_code)
    checkpoint = origin.checkpoint
    needed = checkpoint.total_bytes
    with staged_output(target, force=force, source=source, needed_bytes=needed) as stage:
        if isinstance(weights, StreamedWeights):
            write_text(stage / CONFIG, checkpoint.config_text)
            weights.write(stage)
        else:
            with api.quiet():
                model.save_pretrained(stage, state_dict=_cast(_tied(weights, model), checkpoint))
            restore_keys(stage, checkpoint, _key_map(origin))
        for relative in checkpoint.side_files:
            copy_side_file(source, relative, stage)
        card = read_card(stage)
        write_text(stage / CONFIG, checkpoint.config_text)
        _check(checkpoint, Checkpoint.open(stage))
        write_text(stage / CONFIG, _both_spellings(checkpoint.config_text, origin.config))
        if not _same_settings(origin, Source.open(stage, trust_remote_code=trust_remote_code)):
            write_text(stage / CONFIG, checkpoint.config_text)
        _readable(stage)
        digests = {key: tensor_digest(info) for key, info in Checkpoint.open(stage).tensors.items()}
        own = {"source": {"name": source_identity(checkpoint)["name"]}}  # where no conversion said what it came from
        record = {**own, **(checkpoint.provenance or {}), "uptraining": uptraining, "tensors": digests}
        if card is None or is_signed(card):  # the conversion's own; what it says was true before the training
            write_card(stage, record)
        write_provenance(stage / PROVENANCE, record)


def _readable(folder: Path) -> None:
    """Let whoever may read other new files read these: safetensors makes its files readable by their owner alone."""
    mode = (folder / CONFIG).stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode & 0o777)


def _key_map(source: Source) -> api.KeyMap:
    """Of the source's model, built anew: an engine may have replaced the class and shapes of the trained one."""
    return api.KeyMap(source.meta_model)


def _tied(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Let parameters that are one in the model be one tensor again: only then are they written once."""
    first: dict[int, str] = {}
    tied = dict(weights)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner in weights:
            tied[name] = weights[owner]
    return tied


def _cast(weights: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Give every tensor the dtype it has in the source; tensors without a namesake there get the commonest one."""
    dtypes = [info.dtype for info in checkpoint.tensors.values()]
    common = _float_of(max(set(dtypes), key=dtypes.count))
    cast: dict[str, Tensor] = {}
    done: dict[tuple[int, Any], Tensor] = {}
    for name, value in weights.items():
        info = checkpoint.tensors.get(name)
        dtype = common if info is None else _float_of(info.dtype)
        if dtype is None or not value.is_floating_point():
            dtype = value.dtype
        cast[name] = done.setdefault((id(value), dtype), value.to(dtype))
    return cast


def _float_of(name: str) -> torch.dtype | None:
    """The torch dtype of a stored format that heads can be merged in; None for any other."""
    return torch_dtype(name) if name in FLOATS else None


def _check(source: Checkpoint, written: Checkpoint) -> None:
    shapes = {key: info.shape for key, info in source.tensors.items()}
    for key, info in written.tensors.items():
        if shapes.get(key) != info.shape:
            raise VerificationError(
                f"{key}: written with shape {list(info.shape)}, the source has {shapes.get(key, 'no such tensor')}."
            )
    # A tied tensor that the source holds twice is written once.
    tied = bool(source.config.get("tie_word_embeddings", True))
    missing = [key for key in shapes if key not in written.tensors and not (tied and _is_table(key))]
    if missing:
        raise VerificationError(f"{missing[0]}: in the source, but not among the tensors written.")


def _is_table(key: str) -> bool:
    return key.endswith(("lm_head.weight", "embed_tokens.weight", "embed_in.weight", "embed_out.weight", "wte.weight"))


def both_spellings(folder: Path, text: str, *, trust_remote_code: bool = False) -> str:
    """Add to a config.json the spelling of rotary settings and dtype that it lacks; nothing else changes.

    Args:
        folder: that holds it, perhaps without weights as yet.
        text: what it says.
        trust_remote_code: whether the folder's own code may run.
    """
    return _both_spellings(text, api.load_config(folder, trust_remote_code=trust_remote_code))


def _both_spellings(text: str, known: Any) -> str:
    settings = json.loads(text.removeprefix("\ufeff"))
    edits: dict[tuple[str, ...], Any] = {}
    after: dict[tuple[str, ...], str] = {}
    for path, section, config in _sections(settings, known):
        for new, old in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
            if old in section and new not in section and isinstance(section[old], str):
                edits[(*path, new)], after[(*path, new)] = section[old], old
        rope = section.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            for name, value in _old_rotary(rope).items():
                if name not in section:
                    edits[(*path, name)], after[(*path, name)] = value, "rope_parameters"
        elif "rope_theta" in section and rope is None:
            standard = getattr(config, "rope_parameters", None)
            if isinstance(standard, dict) and "rope_theta" in standard:
                edits[(*path, "rope_parameters")] = dict(standard)
                after[(*path, "rope_parameters")] = "rope_theta"
    return edit_json(text, edits, after=after)


def _old_rotary(rope: dict[str, Any]) -> dict[str, Any]:
    """The fields in which readers before transformers 5 look for what `rope_parameters` says."""
    own = {name: value for name, value in rope.items() if name not in _OLD_ROTARY}
    old = {name: rope[name] for name in _OLD_ROTARY if name in rope}
    return old if own.get("rope_type", "default") == "default" else old | {"rope_scaling": own}


def _sections(settings: dict[str, Any], known: Any) -> list[tuple[tuple[str, ...], dict[str, Any], Any]]:
    """The root and the nested text configuration."""
    sections: list[tuple[tuple[str, ...], dict[str, Any], Any]] = [((), settings, known)]
    if isinstance(settings.get("text_config"), dict):
        sections.append((("text_config",), settings["text_config"], getattr(known, "text_config", None)))
    return sections


def _same_settings(source: Source, written: Source) -> bool:
    """Whether transformers reads the same configuration from both folders."""
    before, after = source.config.to_dict(), written.config.to_dict()
    ignored = {"_name_or_path", *_OLD_ROTARY, "rope_scaling", "torch_dtype"}

    def plain(values: Any) -> Any:
        if isinstance(values, dict):
            return {
                key: value if key == "rope_parameters" else plain(value)
                for key, value in values.items()
                if key not in ignored
            }
        return values

    return bool(plain(before) == plain(after))


FINAL = "final"
"""The result's folder within a run's output."""


def check_final(plan: UptrainPlan, output: Path) -> None:
    """Make sure before training that the result can be written after it.

    Raises:
        OutputError: if what is there under its name may not be replaced, or there is no room.
    """
    check_output(
        (output / FINAL).absolute(),
        force=True,
        source=plan.source,
        needed_bytes=Checkpoint.open(plan.source).total_bytes,
    )


def finish(parts: Parts, output: Path, *, losses: dict[str, float], seconds: float) -> Path:
    """Gather the weights on the main process and write `<output>/final`. Called by every process.

    Raises:
        OutputError: if it cannot be written; checkpoints are there to try again from.
        VerificationError: if what was written is not what the source promised.
    """
    target = output / FINAL
    plain = parts.plain
    weights: dict[str, Tensor] | StreamedWeights = {}
    streamed: StreamedWeights | None = None
    if is_sharded(parts.model) and parts.plan.config.train.parameters != "lora":
        source = Source.open(parts.plan.source, trust_remote_code=parts.plan.config.trust_remote_code)
        streamed = StreamedWeights(parts.scoring_model(), source)
    if streamed is not None and streamed.fits:
        weights = streamed
    elif parts.plan.config.train.parameters == "lora":
        plain = parameters.merged_model(plain)
        weights = gather_weights(plain)
    else:
        weights = {
            plain_name(name).removeprefix("model."): value
            for name, value in gather_weights(parts.scoring_model()).items()
        }
    try:
        if parts.engine.is_main:
            write_final(
                plain,
                weights,
                source=parts.plan.source,
                target=target,
                uptraining=provenance(parts, losses, seconds),
                trust_remote_code=parts.plan.config.trust_remote_code,
            )
    finally:
        if isinstance(weights, StreamedWeights):
            weights.follow()
    parts.engine.wait()
    return target


def told_config(run: UptrainConfig) -> dict[str, Any]:
    """A run's settings as `gqa_convert.json` tells them: without paths, which mean nothing elsewhere."""
    config = run.model_dump(mode="json")
    for key in ("cache", "source", "sources", "held_out_source"):
        config["data"].pop(key, None)
    config["log"].pop("project", None)
    if run.data.source is not None:
        config["data"]["source"] = _told_source(run.data.source)
    else:
        config["data"]["sources"] = [
            {"name": name, "weight": weight, "source": _told_source(source)} for name, source, weight in run.data.named
        ]
    for key in ("model", "output", "expect", "checkpoints", "log", "evaluation", "push", "push_private"):
        config.pop(key, None)
    distillation = config["objective"].get("distillation")
    if distillation:
        distillation["teacher"] = Path(distillation["teacher"]).name
    return config


def _told_source(source: SourceSection) -> dict[str, Any]:
    if source.kind == "hub":
        return source.model_dump(mode="json")
    return {"kind": source.kind, "names": [Path(path).name for path in source.paths]}


def provenance(parts: Parts, losses: dict[str, float], seconds: float) -> dict[str, Any]:
    """What `gqa_convert.json` says of the training."""
    plan = parts.plan
    return {
        "config": told_config(plan.config),
        "steps": plan.horizon.steps,
        "tokens": plan.horizon.tokens,
        "alpha": plan.horizon.alpha,
        "flops": plan.budget.flops,
        "held_out_loss": losses,
        "seconds": round(seconds, 1),
        "engine": parts.engine.name,
        "processes": parts.engine.processes,
        "versions": versions("gqa-convert", "torch", "transformers", "accelerate"),
    }
