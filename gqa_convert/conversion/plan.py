"""The plan of a conversion: all that will be read, merged, edited and written, before a byte of it is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.anatomy import Anatomy, dissect, read_fields
from gqa_convert.anatomy.tensor_merges import Merge
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.block_plan import BlockPlan, plan_blocks
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.conversion.routes import SETTING, Routed, routed
from gqa_convert.errors import GQAConvertError, UsageError
from gqa_convert.heads import HeadLayout
from gqa_convert.modeling import shipping
from gqa_convert.modeling.engines import where_it_runs
from gqa_convert.modeling.transpile.view import computed_keys, computing_bytes

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, kw_only=True)
class ConvertPlan:
    """What `execute` will do. Plain values but for `checkpoint` and `anatomy`, which carry what executing needs.

    `model_type` and `class_name` are the source's; `becomes` says what is written instead, and why, where that is of
    another family.
    """

    source: Path
    target: Path
    model_type: str
    class_name: str
    recipe: Recipe
    layout_before: HeadLayout
    layout_after: HeadLayout
    merged_tensors: int
    copied_tensors: int
    rewritten_tensors: int
    dropped_tensors: int
    config_edits: dict[str, Any]
    side_files: tuple[str, ...]
    bytes_in: int
    bytes_out: int
    parameters_in: int
    parameters_out: int
    kv_cache_bytes_per_token_before: int
    kv_cache_bytes_per_token_after: int
    working_bytes: int
    notes: tuple[str, ...]
    route: str = SETTING
    becomes: str = ""
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
    def solved_tensors(self) -> int:
        """Tensors that are solved with their whole attention block: q, k, v and o."""
        return len(self.blocks.raw_keys) if self.blocks else 0

    @property
    def groups(self) -> int:
        """KV heads after the conversion."""
        return self.layout_after.num_kv_heads

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
        return min(self.groups, self.cross_groups or self.groups)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: sizes in bytes, counts of tensors, layouts."""
        merges = [
            {"key": m.key, "sources": list(m.sources), "from": list(m.shape), "to": list(m.target_shape)}
            for m in self.anatomy.merges
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
    }


def plan(
    source: str | Path,
    *,
    groups: int,
    cross_groups: int | None = None,
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
    chosen = recipe or Recipe(method=method, seed=seed)
    if groups < 1:
        raise UsageError(f"--groups {groups}: at least one KV head is needed; 1 is multi-query attention.")
    folder = resolve_model(str(source), revision=revision)
    way = routed(Checkpoint.open(folder), groups=groups, route=route, trust_remote_code=trust_remote_code)
    anatomy = dissect(way.checkpoint, groups, cross_groups=cross_groups, trust_remote_code=trust_remote_code)
    if anatomy.changed_fields and not allow_slow:
        shipping.check_faster(anatomy.model_type)
    return _assemble(way, anatomy, _target(source, folder, groups, out), chosen, trust_remote_code)


def _target(source: str | Path, folder: Path, groups: int, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out).expanduser()
    if Path(source).expanduser().exists():
        absolute = Path(source).expanduser().absolute()
        return absolute.with_name(
            f"{absolute.resolve().name if absolute.name in ('', '.', '..') else absolute.name}-gqa{groups}"
        )
    return Path(re.sub(r".*/", "", str(source)) + f"-gqa{groups}").absolute()


def _assemble(way: Routed, anatomy: Anatomy, target: Path, recipe: Recipe, trust_remote_code: bool) -> ConvertPlan:
    checkpoint = way.checkpoint
    stored = checkpoint.stored or checkpoint
    blocks = plan_blocks(checkpoint, anatomy, recipe)
    solved = blocks.raw_keys if blocks else frozenset()
    recipe = blocks.recipe if blocks else recipe
    tensors = checkpoint.tensors
    by_key = {merge.key: merge for merge in anatomy.merges}
    dropped = set(anatomy.dropped)
    kept, rewritten = tensors.keys() - by_key.keys() - dropped - solved, computed_keys(checkpoint)
    bytes_out = parameters_out = 0
    for key, info in tensors.items():
        if key in dropped:
            continue
        merge = by_key.get(key)
        bytes_out += info.nbytes * _numel(merge.target_shape) // _numel(merge.shape) if merge else info.nbytes
        parameters_out += _numel(merge.target_shape if merge else info.shape)
    before, after = _cache_bytes(checkpoint, anatomy.merges)
    apart = any(field.target is not None for field in anatomy.fields)
    if not anatomy.merges or (apart and len(anatomy.changed_fields) < len(anatomy.fields)):
        whole = unchanged_cache_bytes(checkpoint, anatomy, trust_remote_code=trust_remote_code)
        before, after = whole, whole - before + after
    main = anatomy.fields[0]
    return ConvertPlan(
        source=checkpoint.folder,
        target=target,
        model_type=way.model_type,
        class_name=way.class_name or anatomy.class_name,
        recipe=recipe,
        layout_before=HeadLayout(
            num_query_heads=main.query_heads, num_kv_heads=main.kv_heads, head_dim=anatomy.head_dim
        ),
        layout_after=HeadLayout(
            num_query_heads=main.query_heads, num_kv_heads=anatomy.groups, head_dim=anatomy.head_dim
        ),
        merged_tensors=len(by_key.keys() - solved),
        copied_tensors=len(kept - rewritten),
        rewritten_tensors=len(kept & rewritten),
        dropped_tensors=len(dropped),
        config_edits={".".join(path): value for path, value in anatomy.edits.items()},
        side_files=tuple(str(path) for path in checkpoint.side_files) + tuple(file.name for file in anatomy.files),
        bytes_in=stored.total_bytes,
        bytes_out=bytes_out,
        parameters_in=sum(_numel(info.shape) for info in stored.tensors.values()),
        parameters_out=parameters_out,
        kv_cache_bytes_per_token_before=before,
        kv_cache_bytes_per_token_after=after,
        working_bytes=max((_working_bytes(checkpoint, merge) for merge in anatomy.merges), default=0)
        + computing_bytes(checkpoint),
        route=way.route,
        becomes=way.becomes,
        notes=way.notes
        + anatomy.notes
        + _code_notes(anatomy)
        + _field_notes(anatomy)
        + (blocks.notes() if blocks else ()),
        checkpoint=checkpoint,
        anatomy=anatomy,
        blocks=blocks,
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _cache_bytes(checkpoint: Checkpoint, merges: tuple[Merge, ...]) -> tuple[int, int]:
    before = after = 0
    for merge in merges:
        width = _DTYPE_BYTES[checkpoint.tensors[merge.key].dtype]
        before += merge.cached * width
        after += merge.cached_target * width
    return before, after


def unchanged_cache_bytes(checkpoint: Checkpoint, anatomy: Anatomy, *, trust_remote_code: bool) -> int:
    """KV-cache bytes per token of a checkpoint that keeps its heads: what a merge to fewer heads would start from.

    0 where no smaller number of heads can be expressed.
    """
    for groups in range(1, anatomy.fields[0].kv_heads):
        try:
            probe = dissect(checkpoint, groups, trust_remote_code=trust_remote_code)
        except GQAConvertError:
            continue
        return _cache_bytes(checkpoint, probe.merges)[0]
    return 0


def _working_bytes(checkpoint: Checkpoint, merge: Merge) -> int:
    """Peak of one merge: the source tensor, its result, and the float32 halves of the running mean."""
    source = sum(checkpoint.tensors[key].nbytes for key in merge.sources)
    return source + checkpoint.tensors[merge.key].nbytes + 12 * _numel(merge.target_shape)


def _code_notes(anatomy: Anatomy) -> tuple[str, ...]:
    if not anatomy.files:
        return ()
    becomes = type(anatomy.target_model).__name__
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
    kept = [f for f in anatomy.fields if f.target is None and f.kv_heads < anatomy.groups]
    return tuple(f"{f.name} stays at {f.kv_heads}: it is below {anatomy.groups} already" for f in kept)


def legal_groups(source: str | Path, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Return the KV-head counts a checkpoint's configuration allows, ascending."""
    way = routed(Checkpoint.open(resolve_model(str(source))), trust_remote_code=trust_remote_code)
    _, fields = read_fields(way.checkpoint, trust_remote_code=trust_remote_code)
    main = fields[0]
    return HeadLayout(num_query_heads=main.query_heads, num_kv_heads=main.kv_heads, head_dim=1).legal_groups
