"""A plan within a size of the KV cache: what may be chosen, on what it is measured, and the plan that comes out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.staging import sibling
from gqa_convert.conversion.head_plan import budget_bytes, kept_layers, legal_counts
from gqa_convert.conversion.plan import ConvertPlan, default_target, plan_source, present_heads
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.errors import UsageError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.allocation import EXCHANGES, MEASURED, OnLayer, allocate, layer_bytes
from gqa_convert.evaluate.evaluation import EvalSettings, make_task
from gqa_convert.evaluate.examples import Example, causal_examples
from gqa_convert.evaluate.text import TokenStream, windows
from gqa_convert.heads import HeadPlan
from gqa_convert.hf.loading import Source, pick_device

WINDOWS = 16
CONTEXT = 256
"""Held-out windows, and tokens of each."""


def plan_within(
    model: str | Path,
    *,
    budget: str,
    recipe: Recipe,
    data: str | None = None,
    work: str | Path | None = None,
    cross_groups: int | None = None,
    keep_layers: str = "",
    tensor_parallel: int = 1,
    min_groups: int = 1,
    out: str | Path | None = None,
    route: str = "auto",
    allow_slow: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    costs_by: str = MEASURED,
    exchanges: int = EXCHANGES,
    on_layer: OnLayer | None = None,
) -> ConvertPlan:
    """Plan a conversion whose KV cache stays within a budget, with KV heads where they are needed.

    Args:
        model: a checkpoint folder or a hub id.
        budget: the size that the KV cache may have; see `gqa_convert.conversion.head_plan.budget_bytes`.
        recipe: how heads will be merged, which layers are measured by too.
        data: held-out text to measure on; by default text that the model writes (decoder-only models).
        work: folder for solved layers and measured costs; by default one beside the output, where the conversion that
            follows finds it. Both go on where they stopped.
        costs_by: how a layer's cost is found: `measured`, or `estimated` in a fraction of the time.
        exchanges: exchanges of heads between two layers to try on the whole model.
        on_layer: told of the progress.
        cross_groups: as this and what follows for `gqa_convert.plan`.
        keep_layers: layers that keep all their KV heads.
        tensor_parallel: devices that are to share the KV heads of every layer.
        min_groups: KV heads that every layer is to have at least.
        out: the folder to write.
        route: for families without a setting for KV heads.
        allow_slow: also plan for families that decode no faster.
        trust_remote_code: allow the model's own Python code to run.
        revision: a branch, tag or commit of a hub id.

    Raises:
        UsageError: if the budget is none, or cannot be met.
        UnsupportedModelError: if the layers of this model cannot differ in KV heads.
        GQAConvertError: of the kind that fits.
    """
    folder = resolve_model(str(model), revision=revision)
    source = Source.open(folder, trust_remote_code=trust_remote_code)
    present = present_heads(source, route=route)
    options = _options(present, keep_layers, tensor_parallel, min_groups)
    target = default_target(model, folder, HeadPlan(present), out)

    def planned(counts: Sequence[int]) -> ConvertPlan:
        heads = HeadPlan(tuple(counts))
        return plan_source(
            source,
            groups=heads.even or heads,
            cross_groups=cross_groups,
            target=target,
            recipe=recipe,
            route=route,
            allow_slow=allow_slow,
        )

    lower = sorted({count for some, heads in zip(options, present, strict=True) for count in some if count < heads})
    if not lower:
        raise UsageError("--kv-budget: no layer may have fewer KV heads than it has now.")
    _check_uneven(planned, options, present)
    plans = {
        count: planned([count if count in some else heads for some, heads in zip(options, present, strict=True)])
        for count in lower
    }
    one = plans[lower[0]]
    before = one.kv_cache_bytes_per_token_before
    wanted = budget_bytes(
        budget, before, lambda groups: planned([groups] * len(present)).kv_cache_bytes_per_token_after
    )
    weights = layer_bytes(plans, present)
    chosen = [lower[0] if lower[0] in layer else heads for layer, heads in zip(weights, present, strict=True)]
    fixed = one.kv_cache_bytes_per_token_after - sum(w[count] for w, count in zip(weights, chosen, strict=True))
    found = allocate(
        plans,
        present,
        options,
        wanted - fixed,
        _examples(source, recipe, data),
        work=sibling(Path(os.path.abspath(target)), "work") if work is None else Path(work).expanduser(),
        data=data or "self",
        costs_by=costs_by,
        exchanges=exchanges,
        on_layer=on_layer,
    )
    found = replace(found, budget=wanted, nbytes=found.nbytes + fixed)
    return replace(planned(found.groups.counts), allocation=found.to_json())


def _options(present: Sequence[int], keep: str, tensor_parallel: int, min_groups: int) -> list[tuple[int, ...]]:
    if tensor_parallel < 1 or min_groups < 1:
        raise UsageError("--tp and --min-groups: must be at least 1.")
    kept = kept_layers(keep, len(present))
    return [
        (heads,) if layer in kept else legal_counts(heads, tensor_parallel=tensor_parallel, min_groups=min_groups)
        for layer, heads in enumerate(present)
    ]


def _check_uneven(planned: Any, options: Sequence[Sequence[int]], present: Sequence[int]) -> None:
    """Plan one layer alone, so that a family whose layers cannot differ is refused before anything is measured."""
    layer = next(number for number, some in enumerate(options) if min(some) < present[number])
    if len(present) > 1:
        planned([min(options[layer]) if number == layer else heads for number, heads in enumerate(present)])


def _examples(source: Source, recipe: Recipe, data: str | None) -> list[Example]:
    subject = models.subject(str(source.folder), trust_remote_code=source.trust_remote_code)
    length = min(subject.max_context or CONTEXT, CONTEXT)
    if data is not None:
        settings = EvalSettings(
            data=data, context=length, max_windows=WINDOWS, trust_remote_code=source.trust_remote_code
        )
        return make_task(subject, subject.source.tokenizer(), settings).examples
    if subject.is_encoder_decoder:
        raise UsageError(
            f"--kv-budget: {subject.name} is an encoder-decoder and writes no text from nothing to be measured on. "
            "Name held-out text with --data."
        )
    from gqa_convert.calibrate.self_text import self_tokens

    ids = self_tokens(
        source.as_stored, sequences=WINDOWS, length=length, device=str(pick_device("auto")), seed=recipe.seed + 1
    )
    stream = TokenStream(ids.flatten().tolist(), [0] * ids.numel())
    return causal_examples(stream, windows(len(stream.ids), context=length, stride=length))
