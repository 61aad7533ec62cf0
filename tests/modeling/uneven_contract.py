"""What must hold of a model whose layers differ in KV heads, in any family: the contract, at one plan.

A conversion whose heads are tied within the groups of each layer computes what its source does; its cached decoding
agrees with its whole forward pass, its cache holds the planned heads, and it is the same when saved and loaded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gqa_convert import convert
from gqa_convert.anatomy.anatomy import dissect, read_layers
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.heads import HeadPlan
from gqa_convert.hf.loading import Source, load_model
from gqa_convert.modeling import shipping, uneven
from gqa_convert.tiny.forward import cache_head_counts, cached_logits, difference, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.overrides import KV_HEADS, SIDE_FILES
from gqa_convert.tiny.shrink import tiny_config

TOLERANCE = 1e-4

FAMILIES = (*sorted(uneven.LIKE_LLAMA), *sorted(shipping.FAMILIES))
USUAL = ("llama", "mistral", "t5", "gpt2", "opt", "bloom", "whisper", "bert")
"""Those of the usual run: each way in which a number for each layer is written and read."""


def check(model_type: str, root: Path) -> None:
    """Run one family through the contract, in the folder `root`."""
    heads, groups = KV_HEADS.get(model_type, (8, 2))
    config = tiny_config(
        model_type, num_layers=3, changes={"sliding_window": None} if model_type == "mistral" else None
    )
    model = tiny_model(config, 1)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    source = root / "source"
    model.save_pretrained(source)
    for file, content in SIDE_FILES.get(model_type, {}).items():
        torch.save(content, source / file)
    plan = _plan(source, heads, groups)
    _tie(source, plan)
    out = root / "uneven"
    result = convert(source, groups=plan.counts, out=out, verify="logits", allow_slow=True, **_route(model_type))
    assert result.plan.layout_after.per_layer == plan.counts
    checks = verify_pair(source, out, logits=True)
    assert checks["merged"]
    assert not checks["differing"]
    native, converted = (load_model(Source.open(folder), dtype=torch.float32) for folder in (source, out))
    inputs = text_inputs(native)
    expected = logits(native, inputs)
    assert difference(logits(converted, inputs), expected) < TOLERANCE, "tied heads: other logits"
    stepped, cache = cached_logits(converted, inputs)
    assert difference(stepped, expected) < TOLERANCE, "cached decoding: other logits"
    counts = cache_head_counts(cache)
    assert counts[: len(plan.counts)] == list(plan.counts), f"cache holds {counts}"
    again = root / "again"
    converted.save_pretrained(again)
    reloaded = load_model(Source.open(again), dtype=torch.float32)
    assert torch.equal(logits(reloaded, inputs), logits(converted, inputs)), "saved and loaded again: other logits"
    fewer = convert(out, groups=1, out=root / "fewer", verify="logits", allow_slow=True)
    assert fewer.plan.layout_before.per_layer == plan.counts
    whole = convert(source, groups=[heads] * len(plan.counts), out=root / "whole", allow_slow=True)
    assert not whole.plan.merges_heads
    assert (
        difference(logits(load_model(Source.open(root / "whole"), dtype=torch.float32), inputs), expected) < TOLERANCE
    )


def _route(model_type: str) -> dict[str, Any]:
    return {"route": "remote-code"} if shipping.ships(model_type) else {}


def _plan(source: Path, heads: int, groups: int) -> HeadPlan:
    """All heads in the first layer, then fewer."""
    layers = read_layers(Source.open(source))
    return HeadPlan(tuple((heads, groups, 1)[min(layer, 2)] for layer in range(layers)))


def _tie(source: Path, plan: HeadPlan) -> None:
    """Make the heads of each group equal in the stored weights, by the rows that the anatomy names."""
    anatomy = dissect(Source.open(source), plan)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= _tied(tensors, {merge.key: merge for merge in anatomy.merges})
        save_file(tensors, file, metadata={"format": "pt"})


def _tied(tensors: Mapping[str, torch.Tensor], merges: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    def first(x: torch.Tensor, grouping: Any, dim: int) -> torch.Tensor:
        heads: torch.Tensor = x.unflatten(dim, (grouping.num_heads, -1))
        return heads.index_select(dim, torch.tensor([m[0] for m in grouping.members])).flatten(dim, dim + 1)

    return {
        key: merges[key].rows.expand(merges[key].rows.merge(x, first)).contiguous()
        for key, x in tensors.items()
        if key in merges
    }
