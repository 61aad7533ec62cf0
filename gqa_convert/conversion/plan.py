"""The plan of a conversion: all that will be read, merged, edited and written, before a byte of it is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.anatomy import Anatomy, dissect, read_fields, read_layers
from gqa_convert.anatomy.shapes import layer_number
from gqa_convert.anatomy.tensor_merges import Merge
from gqa_convert.checkpoint.dtypes import BITS
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.block_plan import BlockPlan, plan_blocks
from gqa_convert.conversion.head_plan import as_groups, planned_groups
from gqa_convert.conversion.operations import (
    Copy,
    Operation,
    Pool,
    Rewrite,
    Solve,
    operations_of,
    working_bytes,
)
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.conversion.routes import SETTING, Routed, routed
from gqa_convert.errors import GQAConvertError, UsageError
from gqa_convert.heads import Groups, HeadLayout, HeadPlan, fewest_groups, most_groups
from gqa_convert.hf.loading import Source
from gqa_convert.modeling import shipping, uneven
from gqa_convert.modeling.engines import where_it_runs
from gqa_convert.modeling.transpile.view import computing_bytes
from gqa_convert.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class ConvertPlan(Outcome):
    """What `execute` will do. Plain values but for `checkpoint` and `anatomy`, which carry what executing needs.

    `operations` is the list of what is written, one for every tensor: what is said of tensors, sizes and caches is
    summed over it. `model_type` and `class_name` are the source's; `becomes` says what is written instead, and why,
    where that is of another family. `allocation` tells how the heads of each layer were chosen, where that was
    measured. `kept_cache_bytes` are those per token of layers that keep their KV heads.
    """

    source: Path
    target: Path
    model_type: str
    class_name: str
    recipe: Recipe
    layout_before: HeadLayout
    layout_after: HeadLayout
    operations: tuple[Operation, ...] = field(repr=False)
    config_edits: dict[str, Any]
    side_files: tuple[str, ...]
    bytes_in: int
    parameters_in: int
    kept_cache_bytes: int
    working_bytes: int
    notes: tuple[str, ...]
    route: str = SETTING
    becomes: str = ""
    allocation: dict[str, Any] | None = field(default=None, repr=False)
    checkpoint: Checkpoint = field(repr=False, compare=False)
    anatomy: Anatomy = field(repr=False, compare=False)
    blocks: BlockPlan | None = field(repr=False, compare=False)

    @property
    def method(self) -> str:
        """The merge method's name."""
        return self.recipe.method

    @property
    def seed(self) -> int:
        """Seed of methods that draw random numbers."""
        return self.recipe.seed

    @property
    def merged_tensors(self) -> int:
        """Tensors whose KV heads are pooled, each by itself."""
        return self._count(Pool)

    @property
    def trust_remote_code(self) -> bool:
        """The user's word, given when planning, that Python code of the source may run."""
        return self.anatomy.source.as_stored.trust_remote_code

    @property
    def solved_tensors(self) -> int:
        """Tensors that are solved with their whole attention block: q, k, v and o."""
        return self._count(Solve)

    @property
    def copied_tensors(self) -> int:
        """Tensors that keep their bytes."""
        return self._count(Copy)

    @property
    def rewritten_tensors(self) -> int:
        """Tensors that are computed for another family, with all their heads."""
        return self._count(Rewrite)

    @property
    def dropped_tensors(self) -> int:
        """Tensors of the source that are not written."""
        return len(self.anatomy.dropped)

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(operation.nbytes for operation in self.operations)

    @cached_property
    def parameters_out(self) -> int:
        """Elements of all tensors that are written."""
        return sum(operation.numel for operation in self.operations)

    @property
    def kv_cache_bytes_per_token_before(self) -> int:
        """Bytes that the source keeps of a token in all layers, in the dtype of its weights; 0 where unknown."""
        return self.kept_cache_bytes + sum(operation.cache_bytes_before for operation in self._of_heads())

    @property
    def kv_cache_bytes_per_token_after(self) -> int:
        """The same of the converted model."""
        return self.kept_cache_bytes + sum(operation.cache_bytes_after for operation in self._of_heads())

    def _of_heads(self) -> Iterator[Pool | Solve]:
        return (operation for operation in self.operations if isinstance(operation, Pool | Solve))

    def _count(self, kind: type[Operation]) -> int:
        return sum(isinstance(operation, kind) for operation in self.operations)

    @property
    def groups(self) -> int:
        """KV heads after the conversion; where layers differ, those of the layer that has most."""
        return self.layout_after.num_kv_heads

    @property
    def merges_heads(self) -> bool:
        """True if any layer has fewer KV heads afterwards."""
        return bool(self.anatomy.changed_fields)

    @property
    def cross_groups(self) -> int | None:
        """KV heads of cross-attention after the conversion, where they are set apart."""
        return next((field.target for field in self.anatomy.fields if field.target is not None), None)

    @property
    def where_it_runs(self) -> tuple[str, ...]:
        """The engines in which such a model was seen to compute what it should, and those in which not."""
        return where_it_runs(self.model_type, str(self.anatomy.target_config.model_type))

    @property
    def max_tensor_parallel(self) -> int:
        """Largest tensor-parallel size at which no KV head is replicated."""
        fewest = min(self.layout_after.per_layer or (self.groups,))
        return min(fewest, self.cross_groups or fewest)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: sizes in bytes, counts of tensors, layouts."""
        merges = [
            {
                "key": operation.key,
                "sources": list(operation.sources),
                "from": list(operation.source_shape),
                "to": list(operation.shape),
                "by": type(operation).__name__.lower(),
            }
            for operation in self._of_heads()
        ]
        return {
            "source": str(self.source),
            "target": str(self.target),
            "model_type": self.model_type,
            "class": self.class_name,
            "route": self.route,
            "becomes": self.becomes,
            "method": self.method,
            "seed": self.seed,
            "recipe": self.recipe.to_json(),
            "before": _layout_json(self.layout_before),
            "after": _layout_json(self.layout_after),
            "cross_groups": self.cross_groups,
            "allocation": self.allocation,
            "merged_tensors": self.merged_tensors,
            "solved_tensors": self.solved_tensors,
            "copied_tensors": self.copied_tensors,
            "rewritten_tensors": self.rewritten_tensors,
            "dropped_tensors": self.dropped_tensors,
            "config_edits": self.config_edits,
            "side_files": list(self.side_files),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "parameters_in": self.parameters_in,
            "parameters_out": self.parameters_out,
            "kv_cache_bytes_per_token_before": self.kv_cache_bytes_per_token_before,
            "kv_cache_bytes_per_token_after": self.kv_cache_bytes_per_token_after,
            "max_tensor_parallel": self.max_tensor_parallel,
            "working_bytes": self.working_bytes,
            "where_it_runs": list(self.where_it_runs),
            "notes": list(self.notes),
            "merges": merges,
        }


def _layout_json(layout: HeadLayout) -> dict[str, Any]:
    return {
        "kind": layout.kind,
        "query_heads": layout.num_query_heads,
        "kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        **({"kv_heads_per_layer": list(layout.per_layer)} if layout.per_layer else {}),
    }


def plan(
    source: str | Path,
    *,
    groups: int | Sequence[int] | HeadPlan,
    cross_groups: int | None = None,
    keep_layers: str = "",
    tensor_parallel: int = 1,
    min_groups: int = 1,
    out: str | Path | None = None,
    method: str = "mean",
    seed: int = 0,
    recipe: Recipe | None = None,
    route: str = "auto",
    allow_slow: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> ConvertPlan:
    """Plan the conversion of a checkpoint to `groups` KV heads without reading a weight.

    Args:
        source: a checkpoint folder or a hub id.
        groups: KV heads after the conversion (as in the paper's GQA-8); 1 is MQA. More groups are closer to the source.
            A sequence has a number for each decoder layer, first to last.
        keep_layers: layers that keep all their KV heads: `first,last`, `0,5`, `0-3`.
        tensor_parallel: devices that are to share the KV heads of every layer without copies.
        min_groups: KV heads that every layer is to have at least.
        cross_groups: KV heads of cross-attention, for models that set them apart; as many as `groups` by default.
        out: the folder to write; by default `<source>-gqa<groups>` beside the source.
        method: a merge method by name; see `gqa_convert.merge.registry.all_methods`.
        seed: for methods that draw random numbers.
        recipe: all choices about the merge at once, instead of `method` and `seed`.
        route: for families without a setting for KV heads: `native` (as another stock family), `remote-code`, or
            `auto`, which is native where that is exact for these groups.
        allow_slow: also plan for families whose KV cache shrinks while decoding gets no faster.
        trust_remote_code: allow the model's own Python code to run.
        revision: a branch, tag or commit of a hub id.

    Raises:
        GQAConvertError: of the kind that fits; see `gqa_convert.errors`.
    """
    folder = resolve_model(str(source), revision=revision)
    opened = Source.open(folder, trust_remote_code=trust_remote_code)
    wanted = as_groups(groups)
    if keep_layers or tensor_parallel != 1 or min_groups != 1 or isinstance(wanted, HeadPlan):
        wanted = planned_groups(
            wanted,
            present_heads(opened, route=route),
            keep_layers=keep_layers,
            tensor_parallel=tensor_parallel,
            min_groups=min_groups,
        )
    return plan_source(
        opened,
        groups=wanted,
        cross_groups=cross_groups,
        target=default_target(source, folder, wanted, out),
        recipe=recipe or Recipe(method=method, seed=seed),
        route=route,
        allow_slow=allow_slow,
    )


def present_heads(source: Source, *, route: str = "auto") -> tuple[int, ...]:
    """Return the KV heads that each decoder layer of a checkpoint has now."""
    way = routed(source, route=route).source
    main = read_fields(way)[0]
    return tuple(main.at(layer) for layer in range(read_layers(way)))


def plan_source(
    source: Source,
    *,
    groups: Groups,
    target: Path,
    recipe: Recipe,
    cross_groups: int | None = None,
    route: str = "auto",
    allow_slow: bool = False,
    cache_now: int | None = None,
) -> ConvertPlan:
    """Plan the conversion of a checkpoint that is open already; several plans of one source share what they read.

    `target` is the folder to write; `cache_now` the source's KV-cache bytes per token, where they are known. The other
    arguments are those of `plan`, which says what is raised.
    """
    if fewest_groups(groups) < 1:
        raise UsageError(f"--groups {groups}: at least one KV head is needed; 1 is multi-query attention.")
    way = routed(source, groups=groups, route=route)
    anatomy = dissect(way.source, groups, cross_groups=cross_groups)
    if anatomy.changed_fields and not allow_slow:
        shipping.check_faster(anatomy.model_type)
    return _assemble(way, anatomy, target, recipe, cache_now)


def default_target(source: str | Path, folder: Path, groups: Groups, out: str | Path | None) -> Path:
    """The folder to write: `out`, or one named after the source."""
    if out is not None:
        return Path(os.path.expanduser(out))
    ending = f"-gqa{groups}" if isinstance(groups, int) else "-gqa-uneven"
    if os.path.exists(os.path.expanduser(source)):
        absolute = Path(os.path.expanduser(source)).absolute()
        return absolute.with_name(
            f"{absolute.resolve().name if absolute.name in ('', '.', '..') else absolute.name}{ending}"
        )
    return Path(re.sub(r".*/", "", str(source)) + ending).absolute()


def _assemble(way: Routed, anatomy: Anatomy, target: Path, recipe: Recipe, cache_now: int | None) -> ConvertPlan:
    checkpoint = way.checkpoint
    stored = checkpoint.stored or checkpoint
    blocks = plan_blocks(checkpoint, anatomy, recipe)
    recipe = blocks.recipe if blocks else recipe
    operations = operations_of(checkpoint, anatomy, recipe, blocks)
    apart = any(field.target is not None for field in anatomy.fields)
    kept = 0
    if not anatomy.merges or anatomy.layers or (apart and len(anatomy.changed_fields) < len(anatomy.fields)):
        whole = unchanged_cache_bytes(anatomy) if cache_now is None else cache_now
        kept = whole - _cache_bytes(checkpoint, anatomy.merges)
    main = anatomy.fields[0]
    heads = {"num_query_heads": main.query_heads, "head_dim": anatomy.head_dim}
    before, after = anatomy.layers or ((), ())
    return ConvertPlan(
        source=checkpoint.folder,
        target=target,
        model_type=way.model_type,
        class_name=way.class_name or anatomy.class_name,
        recipe=recipe,
        layout_before=HeadLayout(num_kv_heads=main.kv_heads, per_layer=_differing(before), **heads),
        layout_after=HeadLayout(
            num_kv_heads=max(after, default=0) or most_groups(anatomy.groups), per_layer=_differing(after), **heads
        ),
        operations=operations,
        config_edits={".".join(path): value for path, value in anatomy.edits.items()},
        side_files=tuple(str(path) for path in checkpoint.side_files) + tuple(file.name for file in anatomy.files),
        bytes_in=stored.total_bytes,
        parameters_in=sum(info.numel for info in stored.tensors.values()),
        kept_cache_bytes=kept,
        working_bytes=max((working_bytes(checkpoint, operation) for operation in operations), default=0)
        + computing_bytes(checkpoint),
        route=way.route,
        becomes=way.becomes,
        notes=stored.notes
        + way.notes
        + anatomy.notes
        + _code_notes(anatomy)
        + _field_notes(anatomy)
        + (blocks.notes() if blocks else ()),
        checkpoint=checkpoint,
        anatomy=anatomy,
        blocks=blocks,
    )


def _differing(counts: tuple[int, ...]) -> tuple[int, ...]:
    return counts if len(set(counts)) > 1 else ()


def _cache_bytes(checkpoint: Checkpoint, merges: tuple[Merge, ...]) -> int:
    """KV-cache bytes per token of what could be merged, before it is."""
    return sum(merge.cached * BITS[checkpoint.tensors[merge.key].dtype] // 8 for merge in merges)


def unchanged_cache_bytes(anatomy: Anatomy) -> int:
    """KV-cache bytes per token of a checkpoint that keeps its heads: what a merge to fewer heads would start from.

    0 where no smaller number of heads can be expressed.
    """
    if any(field.layers for field in anatomy.fields):
        return _differing_cache_bytes(anatomy)
    for groups in range(1, anatomy.fields[0].kv_heads):
        try:
            probe = dissect(anatomy.source, groups)
        except GQAConvertError:
            continue
        return _cache_bytes(anatomy.source.checkpoint, probe.merges)
    return 0


def _differing_cache_bytes(anatomy: Anatomy) -> int:
    """The same of a checkpoint whose layers differ: bytes of one head, seen where heads can be merged, times heads."""
    probe = dissect(anatomy.source, 1)
    layers = read_layers(anatomy.source)
    total = 0
    for kv_field in anatomy.fields:
        per_head: dict[int, int] = {}
        for merge in probe.merges:
            if not merge.cached or kv_field.cross != shipping.is_cross(merge.name):
                continue
            nbytes = merge.cached * BITS[anatomy.source.checkpoint.tensors[merge.key].dtype] // 8
            layer = layer_number(merge.name)
            per_head[layer] = per_head.get(layer, 0) + nbytes // merge.rows.heads
        total += max(per_head.values(), default=0) * sum(kv_field.at(layer) for layer in range(layers))
    return total


def _code_notes(anatomy: Anatomy) -> tuple[str, ...]:
    if not anatomy.files:
        return ()
    becomes = type(anatomy.target_model).__name__
    if anatomy.files[0] == uneven.FILE:
        return (
            f"becomes {becomes}: transformers gives every layer of {anatomy.model_type} the same number of KV heads, "
            f"so {anatomy.files[0].name} goes along; load with trust_remote_code=True",
            uneven.engine_note(anatomy.target_config),
        )
    return (
        f"becomes {becomes}: transformers gives {anatomy.model_type} no setting for KV heads, so "
        f"{anatomy.files[0].name} goes along; load with trust_remote_code=True, or after `import gqa_convert`",
        *_speed_notes(anatomy),
    )


def _speed_notes(anatomy: Anatomy) -> tuple[str, ...]:
    if not shipping.is_slow(str(anatomy.target_config.model_type)):
        return ()
    return (
        "the KV cache shrinks, but decoding is no faster than with all heads: this family's attention in transformers "
        "knows no groups, so every KV head is repeated for its query heads at every step",
    )


def _field_notes(anatomy: Anatomy) -> tuple[str, ...]:
    if not isinstance(anatomy.groups, int):
        return ()
    kept = [f for f in anatomy.fields if f.target is None and f.kv_heads < anatomy.groups]
    return tuple(f"{f.name} stays at {f.kv_heads}: it is below {anatomy.groups} already" for f in kept)


def legal_groups(source: str | Path, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Return the KV-head counts a checkpoint's configuration allows, ascending."""
    way = routed(Source.open(resolve_model(str(source)), trust_remote_code=trust_remote_code))
    main = read_fields(way.source)[0]
    return HeadLayout(num_query_heads=main.query_heads, num_kv_heads=main.kv_heads, head_dim=1).legal_groups
