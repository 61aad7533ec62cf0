"""Check a written checkpoint: its keys and shapes, its bytes against the source's, and what it computes.

`structure` reads headers and configuration only. `logits` loads both models: the converted one must agree with the
source in which every KV head was replaced by its group's merged head, which is the same function by construction, so
any disagreement is a fault of layout, configuration or loading and not the cost of the merge. A conversion by mean must
also agree with the source in which every KV head was replaced by the mean of the adjacent heads of its group, taken
here anew from the loaded parameters, so that heads merged in the wrong groups or rows do not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.anatomy import check_target
from gqa_convert.anatomy.target import stated_counts
from gqa_convert.checkpoint.dtypes import named_float, torch_dtype
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError, VerificationError
from gqa_convert.heads import Grouping, merge_heads, split_heads
from gqa_convert.hf.loading import Source, load_model, pick_device
from gqa_convert.modeling.transpile.view import widened
from gqa_convert.tiny.forward import logits
from gqa_convert.tiny.model import text_inputs
from gqa_convert.tiny.sizes import TEXT_IDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gqa_convert.anatomy.shapes import ShapeDifference
    from gqa_convert.conversion.plan import ConvertPlan
LOGIT_TOLERANCE = 1e-4
"""Largest accepted logit difference, as a share of the largest logit, where models run in float32."""
_COARSER = {"auto": 1.0, "float32": 1.0, "float16": 100.0, "bfloat16": 500.0}
"""How many times that in another precision: both models round at every layer, each in its own way."""

MEAN_TOLERANCE = 10 * LOGIT_TOLERANCE
"""The same where means are taken anew: another order of summing may round to the other neighbour in half precision."""


def verify_output(planned: ConvertPlan, folder: Path, *, level: str, device: str = "auto") -> dict[str, Any]:
    """Verify a folder written by following `planned`.

    Returns:
        What was checked, with counts and the largest logit difference where models were run.

    Raises:
        VerificationError: naming the first thing that is not as planned.
    """
    if level == "none":
        return {}
    checks = verify_structure(planned, folder)
    if level == "logits":
        checks |= verify_logits(planned, folder, device=device)
    return checks


def verify_structure(planned: ConvertPlan, folder: Path, *, trained: bool = False) -> dict[str, Any]:
    """Check configuration, keys, shapes and dtypes without reading a weight. See `verify_output`.

    `trained` says that the folder was trained since, when transformers writes tied tensors once.
    """
    written = Checkpoint.open(folder)
    config = Source.of(written, trust_remote_code=planned.trust_remote_code).config
    expected = planned.anatomy.target_config.model_type
    if config.model_type != expected:
        raise VerificationError(f"{folder / 'config.json'}: model_type is {config.model_type}, not {expected}.")
    for kv_field in planned.anatomy.changed_fields:
        value = stated_counts(config, written.config, kv_field)
        wanted = kv_field.after(planned.anatomy.groups, len(planned.anatomy.layers[0]) if planned.anatomy.layers else 1)
        if value != wanted and stated_counts(None, written.config, kv_field) != wanted:
            raise VerificationError(f"{folder / 'config.json'}: {kv_field.name} reads {value}, not {wanted}.")
    shapes = {key: info.shape for key, info in written.tensors.items()}
    check_target(planned.anatomy, planned.checkpoint, shapes, tied_once=trained)
    expected_bytes = 0
    for operation in planned.operations:
        info = written.tensors.get(operation.key)
        if info is None:  # tied, and written once
            continue
        expected_bytes += operation.nbytes
        if (info.dtype, info.shape) != (operation.dtype, operation.shape):
            raise VerificationError(
                f"{info.key}: {info.dtype} {info.shape} written, {operation.dtype} {operation.shape} planned."
            )
    if written.total_bytes != expected_bytes:
        raise VerificationError(f"{folder}: {written.total_bytes} bytes of tensors, {expected_bytes} planned.")
    return {"tensors": len(shapes), "merged": planned.merged_tensors, "bytes": written.total_bytes}


def verify_logits(
    planned: ConvertPlan, folder: Path, *, trained: bool = False, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """Run both models and compare. Both are held in memory. See the module's docstring.

    `trained` says that the folder was trained since, so that its heads are means of the source's no more. Models run on
    `device`, in `dtype`: `auto` is float32; with fewer bits larger differences are accepted.
    """
    place, floats = pick_device(device), _float(dtype)

    written = Source.open(folder, trust_remote_code=planned.trust_remote_code)
    try:
        converted = load_model(written, dtype=floats, device=place)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    inputs = {name: value.to(place) for name, value in _inputs(converted).items()}
    viewed = planned.anatomy.source.stored is not None
    checks = verify_transpiling(planned.anatomy.source, inputs, device=place) if viewed else {}
    source = load_model(planned.anatomy.source, dtype=floats, device=place)
    seen = _logits(planned, converted, inputs)
    scale = max(float(seen.abs().max()), 1e-30)
    coarser = _COARSER[str(floats).removeprefix("torch.")]
    replaced = [(source.state_dict(), LOGIT_TOLERANCE, "the source")]
    difference = planned.anatomy.difference
    if difference is not None:
        replaced = [(difference.expand(converted.state_dict()), LOGIT_TOLERANCE, "the source with merged heads")]
        if planned.method == "mean" and planned.blocks is None and not trained:
            means = _with_means(planned, difference, source.state_dict())
            replaced.insert(0, (means, MEAN_TOLERANCE, "the source with the means of adjacent heads"))
    worst = 0.0
    for state, tolerance, what in replaced:
        source.load_state_dict(state, strict=False)
        worst = float((_logits(planned, source, inputs) - seen).abs().max())
        if not worst <= coarser * tolerance * scale:
            raise VerificationError(f"{folder}: logits differ by {worst:.3g} at scale {scale:.3g} from {what}.")
    return {"logit_difference": worst, "logit_scale": scale, **checks}


def _logits(planned: ConvertPlan, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    try:
        return logits(model, inputs)
    except Exception as error:
        raise VerificationError(
            f"{planned.class_name}: cannot be run on text alone ({type(error).__name__}: {error}). "
            "Use --verify structure."
        ) from error


def _with_means(planned: ConvertPlan, difference: ShapeDifference, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace every KV head in the source model's state by the mean of its group, in the precision of the file."""
    import torch

    merges = planned.anatomy.merges
    stored = {merge.name: torch_dtype(planned.checkpoint.tensors[merge.key].dtype) for merge in merges}
    usual = next(iter(stored.values()))
    means = dict(state)
    for name, rows in difference.rows.items():
        merged = rows.merge(state[name], _mean_of_adjacent)
        means[name] = rows.expand(merged.to(stored.get(name, usual)).float())
    for name, names in difference.stacks.items():
        index, size = difference.stack_of(name)
        start = index - index % size
        mean = torch.stack([state[other] for other in names[start : start + size]]).mean(dim=0)
        means[name] = mean.to(stored.get(names[index // size], usual)).float()
    return means


def _mean_of_adjacent(x: Tensor, grouping: Grouping, dim: int) -> Tensor:
    heads = split_heads(x, grouping.num_groups * grouping.group_size, dim)
    return merge_heads(heads.unflatten(dim, (grouping.num_groups, grouping.group_size)).mean(dim=dim + 1), dim)


def _inputs(model: Any) -> dict[str, Tensor]:
    """Random ids, and random encoder features for a decoder that listens or sees.

    Ids come from the lower half of the vocabulary: those that stand for an image or a sound usually lie at its end.
    """
    text = model.config.get_text_config(decoder=True)
    return text_inputs(model, vocabulary=int(getattr(text, "vocab_size", None) or 2 * TEXT_IDS) // 2)


def verify_transpiling(view: Source, inputs: dict[str, Tensor], *, device: Any = None) -> dict[str, Any]:
    """Run the stored model and the view of it with all its heads, in float32, one after the other.

    The view must compute the same before its tensors are rounded to the stored dtype; what rounding adds is reported.

    Returns:
        `transpiling_difference` and `transpiling_rounding`: largest logit differences without and with rounding.

    Raises:
        VerificationError: if the view computes something else.
    """
    assert view.stored is not None
    expected = _float32_logits(view.stored, inputs, device)
    scale = max(float(expected.abs().max()), 1e-30)
    exact, rounded = (
        float((_float32_logits(each, inputs, device) - expected).abs().max())
        for each in (replace(view, checkpoint=widened(view.checkpoint)), view)
    )
    if not exact <= LOGIT_TOLERANCE * scale:
        raise VerificationError(
            f"{view.folder}: written as {view.model_type}, its logits differ by {exact:.3g} at scale {scale:.3g}."
        )
    return {"transpiling_difference": exact, "transpiling_rounding": rounded}


def _float(dtype: str) -> torch.dtype:
    import torch

    return torch.float32 if dtype == "auto" else named_float(dtype)


def _float32_logits(source: Source, inputs: dict[str, Tensor], device: Any) -> Tensor:
    import torch

    model = load_model(source, dtype=torch.float32, device=device)
    with torch.no_grad():
        scores: Tensor = model(**inputs, use_cache=False).logits
    return scores
