"""What converting one layer alone costs.

The original's layer is given the converted layer's weights with every merged head written back once for each head it
replaces: the same function as the converted layer, in the original's shapes. All other layers stay as they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gqa_convert.conversion.plan import ConvertPlan
from gqa_convert.conversion.recorded import read_record, recorded_plan
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.evaluation import EvalSettings, make_task
from gqa_convert.evaluate.intervals import mean_per_token
from gqa_convert.evaluate.results import LayerCost
from gqa_convert.evaluate.scoring import score


def layer_costs(
    base: str | Path,
    converted: str | Path,
    settings: EvalSettings,
    *,
    on_layer: Callable[[int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> list[LayerCost]:
    """Measure the loss cost of each layer of a conversion by itself, in order of the layers that it changed.

    Args:
        base: the original.
        converted: a conversion of it.
        settings: the data and how to cut it; a few dozen windows are enough to rank layers.
        on_layer: called with 1 after each layer.
        on_total: called once with the number of layers.

    Raises:
        UnsupportedModelError: if the conversion has as many KV heads as the original.
        VerificationError: if the one is no conversion of the other.
        GQAConvertError: if a model cannot be loaded.
    """
    trust = settings.trust_remote_code
    first, second = (models.subject(str(m), trust_remote_code=trust) for m in (base, converted))
    task = make_task(first, first.source.tokenizer(), settings)
    conversion = recorded_plan(first.folder, second.folder, read_record(second.folder), trust_remote_code=trust)
    original = _original(conversion, first, settings)
    layers = _changed_by_layer(conversion, second, original, settings)
    if on_total is not None:
        on_total(len(layers))
    sums, _, _ = score(original, None, task.examples, batch_size=settings.batch_size)
    costs = []
    state = original.state_dict()
    for name, tensors in layers.items():
        kept = {key: state[key].clone() for key in tensors}
        original.load_state_dict(tensors, strict=False)
        seen, _, _ = score(original, None, task.examples, batch_size=settings.batch_size)
        original.load_state_dict(kept, strict=False)
        pairs = zip(sums.sums["loss"], seen.sums["loss"], strict=True)
        rise = mean_per_token([after - before for before, after in pairs], seen.tokens, block=task.block)
        costs.append(LayerCost(layer=name, loss_difference=rise.value, interval=(rise.low, rise.high)))
        if on_layer is not None:
            on_layer(1)
    return costs


def _original(conversion: ConvertPlan, first: models.Subject, settings: EvalSettings) -> Any:
    """The original, as a model of the family that it was converted as."""
    return models.load(replace(first, source=conversion.anatomy.source), dtype=settings.dtype, device=settings.device)


def _changed_by_layer(
    conversion: ConvertPlan, second: models.Subject, original: Any, settings: EvalSettings
) -> dict[str, dict[str, torch.Tensor]]:
    """The converted weights in the original's shapes, only those that differ, by layer."""
    if conversion.anatomy.difference is None:
        raise UnsupportedModelError(f"{second.name}: has as many KV heads as the original; no layer was converted.")
    converted = models.load(second, dtype=settings.dtype, device=settings.device)
    expanded = conversion.anatomy.difference.expand(converted.state_dict())
    state = original.state_dict()
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in expanded.items():
        if key in state and not torch.equal(state[key], value):
            layers.setdefault(_layer_of(key), {})[key] = value
    return dict(sorted(layers.items(), key=lambda item: _order(item[0])))


def _layer_of(key: str) -> str:
    """The path of the layer a parameter is in: up to its first number (`model.layers.3`), else `rest`."""
    match = re.match(r".*?\.\d+(?=\.)", key)
    return match[0] if match else "rest"


def _order(name: str) -> tuple[str, int]:
    head, _, number = name.rpartition(".")
    return (head, int(number)) if number.isdigit() else (name, 0)
