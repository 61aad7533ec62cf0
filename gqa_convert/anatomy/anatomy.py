"""What in a checkpoint must be merged for a given number of KV heads, found from the model's own code.

The model is built twice without memory, with the source's KV heads and with the target's. The parameters whose shape
differs are exactly what depends on KV heads: weights, biases, full-width key norms, depthwise convolutions, whatever
the family has. Raw checkpoint keys are then mapped to module names with transformers' own loading rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gqa_convert.anatomy import family_facts
from gqa_convert.anatomy.filling import Filling, check_filled, filling, filling_notes, packed_keys, tied_names
from gqa_convert.anatomy.kv_fields import KVField, aim, check_groups, check_plan, get_path
from gqa_convert.anatomy.own_code import prove_own_code
from gqa_convert.anatomy.shapes import ShapeDifference
from gqa_convert.anatomy.stated import stated_heads
from gqa_convert.anatomy.target import decoder_layers, fields_of, retarget
from gqa_convert.anatomy.tensor_merges import Finder, Merge
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import UnsupportedModelError, VerificationError
from gqa_convert.heads import Groups, HeadPlan, fewest_groups
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source
from gqa_convert.modeling import shipping, uneven


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A checkpoint's attention, as far as converting it to `groups` KV heads needs to know it.

    `layers` are the KV heads of each decoder layer before and after, where either differ in them; else empty.
    """

    model_type: str
    class_name: str
    groups: Groups
    layers: tuple[tuple[int, ...], tuple[int, ...]] | tuple[()]
    fields: tuple[KVField, ...]
    changed_fields: tuple[KVField, ...]
    head_dim: int
    edits: dict[tuple[str, ...], Any]
    merges: tuple[Merge, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()
    source: Source = field(repr=False)
    target_config: Any = field(repr=False)
    target_model: Any = field(repr=False)
    key_map: api.KeyMap = field(repr=False)
    """Raw key -> names in the source's model."""
    filling: Filling = field(repr=False)
    """How the source's tensors fill the source's model: as they should."""
    difference: ShapeDifference | None = field(repr=False)
    files: tuple[Path, ...] = ()
    """Modelling code that the converted folder needs beside its weights."""

    @property
    def config(self) -> Any:
        """The source's configuration."""
        return self.source.config


def read_fields(source: Source) -> tuple[KVField, ...]:
    """Return a checkpoint's KV-head fields, the main one first.

    Raises:
        UnsupportedModelError: if the family has no KV heads to merge or no setting for their number.
    """
    config, model_type = source.config, source.model_type
    kind, reason = family_facts.refused_families().get(model_type, ("", ""))
    if kind in ("C", "D"):
        raise UnsupportedModelError(f"{model_type} cannot become a grouped-query model here: {reason}.")
    fields = fields_of(config, source.checkpoint.config, lambda: source.meta_model)
    if not fields:
        raise UnsupportedModelError(
            f"{model_type} cannot become a grouped-query model here: transformers {api.version()} gives "
            "its decoder no setting for the number of KV heads."
        )
    owner = get_path(config, fields[0].path[:-1]) or config
    if getattr(owner, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{model_type} cannot become a grouped-query model here: multi-head latent attention "
            f"(kv_lora_rank={owner.kv_lora_rank}) caches a latent, not KV heads."
        )
    return fields


def read_layers(source: Source) -> int:
    """Return the number of a checkpoint's decoder layers.

    Raises:
        UnsupportedModelError: if its configuration does not say.
    """
    return decoder_layers(source.config, lambda: source.meta_model)


def dissect(source: Source, groups: Groups, *, cross_groups: int | None = None) -> Anatomy:
    """Find what converting `source` to `groups` KV heads must merge, edit and drop.

    `groups` are those of every decoder layer, or of each.

    `cross_groups` sets the KV heads of cross-attention apart, where the model can.

    Raises:
        UsageError: if `groups` does not divide the KV heads.
        UnsupportedModelError: if the model cannot be expressed with that many KV heads; the message has the reason.
        CheckpointError: if the weights are not those that the configuration describes.
    """
    checkpoint, config = source.checkpoint, source.config
    fields = aim(read_fields(source), cross_groups)
    apart = isinstance(groups, HeadPlan) or any(field.layers for field in fields)
    layers = read_layers(source) if apart else 1
    if isinstance(groups, HeadPlan):
        changed = check_plan(fields, groups, layers)
    else:
        changed = check_groups(fields, groups, stated_heads((checkpoint.stored or checkpoint).config, fields[0]))
    why = family_facts.refusal(config, fewest_groups(groups), fields[0].kv_heads)
    if why:
        raise UnsupportedModelError(f"--groups {groups}: {why}")
    if changed and shipping.ships(source.model_type) and api.own_code(config):
        raise UnsupportedModelError(
            f"{source.folder}: config.json's auto_map names modelling code of its own ({api.own_code(config)}), and "
            f"{source.model_type} gets its KV heads by {shipping.FILE.name}, which goes by transformers' own code and "
            "not by that. If both compute the same, convert a copy of the folder without auto_map in its config.json."
        )
    cls = source.model_class
    edits, target_config, target_cls = retarget(
        config, checkpoint.config, cls, fields, groups, checkpoint.folder, layers
    )
    files = (shipping.FILE,) if shipping.is_shipped(str(target_config.model_type)) else ()
    files = (uneven.FILE,) if uneven.is_uneven(target_config) else files
    source_model = source.meta_model
    target_model = api.build_on_meta(target_cls, target_config) if changed else source_model
    difference = ShapeDifference(source_model, target_model, fields, groups) if changed else None
    key_map = api.KeyMap(source_model)
    finder = Finder(checkpoint, difference, key_map) if difference else None
    source_filling = check_filled(checkpoint, source_model, key_map)
    merged = {merge.key for merge in finder.merges} if finder else set()
    left = replace(source_filling, unread=tuple(key for key in source_filling.unread if key not in merged))
    proof = (prove_own_code(source, difference),) if difference and source.own_code else ()
    return Anatomy(
        model_type=str(config.model_type),
        class_name=cls.__name__,
        groups=groups,
        layers=_per_layer(fields[0], groups, layers) if apart else (),
        fields=fields,
        changed_fields=changed,
        head_dim=(finder.head_dim if finder else 0) or _config_head_dim(config, fields[0]),
        edits=edits,
        merges=tuple(finder.merges) if finder else (),
        dropped=tuple(finder.dropped) if finder else (),
        notes=(tuple(finder.notes) if finder else ()) + filling_notes(checkpoint, left, cls.__name__) + proof,
        source=source,
        target_config=target_config,
        target_model=target_model,
        key_map=key_map,
        filling=source_filling,
        difference=difference,
        files=files,
    )


def _per_layer(main: KVField, groups: Groups, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    before = tuple(main.at(layer) for layer in range(layers))
    return before, tuple(main.wanted_at(groups, layer) for layer in range(layers))


def _config_head_dim(config: Any, main: KVField) -> int:
    owner = get_path(config, main.path[:-1]) or config
    explicit = vars(owner).get("head_dim")  # not getattr: Gemma 4 refuses to name one where layers differ
    if isinstance(explicit, int):
        return explicit
    hidden = getattr(owner, "hidden_size", None) or main.query_heads
    return max(1, int(hidden) // main.query_heads)


def check_target(
    anatomy: Anatomy, source: Checkpoint, shapes: Mapping[str, tuple[int, ...]], *, tied_once: bool = False
) -> None:
    """Check that written tensors fill the target model as the source's fill the source's.

    Args:
        anatomy: of the conversion.
        source: what was converted.
        shapes: raw key -> shape of every written tensor.
        tied_once: accept that of tensors that are tied in the model only one is written, as transformers saves them.

    Raises:
        VerificationError: naming what is missing, unexpected or of the wrong shape.
    """
    key_map = api.KeyMap(anatomy.target_model)
    strange = [key for key in shapes if key not in source.tensors]
    if strange:
        raise VerificationError(f"{strange[0]}: written, but not in the source.")
    for merge in anatomy.merges:
        if merge.cached and merge.key in shapes and not key_map.targets(merge.key):
            raise VerificationError(f"{merge.key}: the converted model has no place for it.")
    lost = set(source.tensors) - set(shapes) - set(anatomy.dropped)
    if tied_once:
        lost = {key for key in lost if not set(key_map.targets(key)) & tied_names(anatomy.target_model)}
    if lost:
        raise VerificationError(f"{sorted(lost)[0]}: in the source, but not written ({len(lost)} such tensors).")
    result = filling(anatomy.target_model, key_map, shapes, packed=packed_keys(source))
    if result.fault and not key_map.exact_only:
        raise VerificationError(f"{result.fault} ({type(anatomy.target_model).__name__}).")
