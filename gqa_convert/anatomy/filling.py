"""Whether stored tensors fill a model: every parameter has its tensor, of its shape, and what is left over is known.

By transformers' own rules: keys are renamed as loading renames them, tied parameters need one tensor together, and what
a class lists as computed (`_keys_to_ignore_on_load_missing`) needs none. Buffers are never asked for: they are computed
where they are not stored.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.dtypes import FLOATS
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError
from gqa_convert.hf.api import KeyMap

Shape = tuple[int, ...]

_KEEP_COUNT = frozenset({"Transpose", "MergeModulelist", "SplitModulelist", "Concatenate", "Chunk", "Split"})
"""Operations of loading that leave the number of elements as it is."""

if TYPE_CHECKING:
    from gqa_convert.hf.loading import Source


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How stored tensors fill a model.

    Attributes:
        missing: parameters that no tensor fills, in the model's order.
        wrong: tensors (or parameters filled by several) of another size than the model's, with a few words on each.
        unread: raw keys that the model's code does not read, but for those that it says it ignores.
    """

    missing: tuple[str, ...] = ()
    wrong: Mapping[str, str]
    unread: tuple[str, ...] = ()

    @property
    def fault(self) -> str:
        """What keeps the tensors from filling the model, for a message; empty if nothing does."""
        if self.missing:
            return f"the weights lack {_first(self.missing)}, which config.json calls for"
        if self.wrong:
            key, how = next(iter(self.wrong.items()))
            more = len(self.wrong) - 1
            return f"{key} {how}" + (f"; {more} more do not fit ({_first([*self.wrong][1:])})" if more else "")
        return ""


def _first(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def filling(
    model: Any, key_map: KeyMap, shapes: Mapping[str, Shape], *, packed: frozenset[str] = frozenset()
) -> Filling:
    """Tell how tensors fill a model.

    Args:
        model: the model, with or without memory.
        key_map: of the model.
        shapes: raw key -> shape of every stored tensor.
        packed: the raw keys of quantised tensors, whose shapes are their own; empty for plain weights.
    """
    covered: set[str] = set()
    unread: list[str] = []
    wrong: dict[str, str] = {}
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for key, shape in shapes.items():
        names = key_map.targets(key)
        covered.update(names)
        if not names:
            unread.append(key)
            if packed:
                covered.update(_packed_for(key_map, key))
            continue
        operations = frozenset(key_map.operations(key))
        if key in packed or not operations <= _KEEP_COUNT:
            continue
        if operations or len(names) > 1:
            counts[names] += math.prod(shape)
        elif shape != tuple(key_map.names[names[0]].shape):
            wrong[key] = _not_of(shape, tuple(key_map.names[names[0]].shape))
    for names, count in counts.items():
        expected = sum(math.prod(key_map.names[name].shape) for name in names)
        if count != expected:
            wrong[", ".join(names)] = f"holds {count:,} elements in the weights, but config.json calls for {expected:,}"
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    missing = set(parameters) - covered - _shared(model, covered)
    ignored = _patterns(model, "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save")
    unexpected = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    return Filling(
        missing=tuple(name for name in parameters if name in missing and not _any(ignored, name)),
        wrong=wrong,
        unread=tuple(key for key in unread if not _any(unexpected, key) and not _COMPUTED.search(key)),
    )


_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Buffers that old checkpoints hold and today's code computes."""


def _not_of(shape: Shape, expected: Shape) -> str:
    return f"has shape {shape}, but config.json calls for {expected}"


def _shared(model: Any, covered: set[str]) -> set[str]:
    """Parameters that get their values from one that is covered: tied ones, and those of modules that are the same."""
    groups: dict[Any, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for alias, original in tied.items():
        groups[original] |= {alias, original}
    shared: set[str] = set()
    changed = True
    while changed:  # a parameter may be tied to one that is itself shared
        reached = {name for group in groups.values() if group & (covered | shared) for name in group}
        changed = not reached <= shared
        shared |= reached
    return shared


def tied_names(model: Any) -> frozenset[str]:
    """Parameters that are tied to another, that other one included."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return frozenset(tied) | frozenset(tied.values())


def _packed_for(key_map: KeyMap, key: str) -> Iterator[str]:
    """Parameters that one tensor of a quantised weight stands for: `x_blocks` for `x`, `m.qweight` for `m.weight`."""
    module = key.rpartition(".")[0]
    for stem in (key.rpartition("_")[0], f"{module}.weight"):
        if stem:
            yield from key_map.targets(stem)


def _patterns(model: Any, *attributes: str) -> list[re.Pattern[str]]:
    return [re.compile(p) for name in attributes for p in getattr(model, name, None) or ()]


def _any(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def packed_keys(checkpoint: Checkpoint) -> frozenset[str]:
    """Raw keys of tensors that are not plain numbers; only where config.json says that the weights are quantised."""
    if quantization(checkpoint) is None:
        return frozenset()
    return frozenset(key for key, info in checkpoint.tensors.items() if info.dtype not in FLOATS)


def quantization(checkpoint: Checkpoint) -> str | None:
    """The method that config.json's quantization_config names; None where there is none."""
    text = checkpoint.config.get("text_config")
    for section in (checkpoint.config, text if isinstance(text, Mapping) else {}):
        stated = section.get("quantization_config")
        if isinstance(stated, Mapping):
            return str(stated.get("quant_method", "of no named method"))
    return None


def check_filled(checkpoint: Checkpoint, model: Any, key_map: KeyMap) -> Filling:
    """Hold a checkpoint to what its model calls for, before anything is done with it.

    Raises:
        CheckpointError: naming the parameters that have no tensor, or the tensors of another shape.
    """
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    result = filling(model, key_map, shapes, packed=packed_keys(checkpoint))
    if result.fault and not key_map.exact_only:
        raise CheckpointError(f"{checkpoint.folder}: {result.fault} ({type(model).__name__}).")
    return result


def check_loads(source: Source) -> Filling:
    """As `check_filled`, of any checkpoint: one that is not to be converted.

    Raises:
        GQAConvertError: also if its model cannot be built.
    """
    model = source.meta_model
    return check_filled(source.checkpoint, model, KeyMap(model))


def filling_notes(checkpoint: Checkpoint, result: Filling, class_name: str) -> tuple[str, ...]:
    """What a user should know of a checkpoint that loads: what is left over, and what its configuration claims."""
    notes = []
    if result.unread:
        notes.append(f"{class_name} does not read {_first(result.unread)}: carried along as stored")
    method = quantization(checkpoint)
    if method is not None and not packed_keys(checkpoint):
        notes.append(
            f"config.json has a quantization_config ({method}), but the weights are plain: it is carried along, and "
            "whoever loads the result quantises it so, or fails without that library; remove it if it is a leftover"
        )
    return tuple(notes)
