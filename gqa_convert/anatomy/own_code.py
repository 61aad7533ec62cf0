"""Proof that a checkpoint's own modelling code has its heads where the conversion takes them to be.

transformers' own families were run through the contract; a checkpoint's own code is anybody's. Before it is converted
two things must hold: every axis that the number of KV heads changes is that many heads of the configured width, and
converting a tiny model of that very class, in which the heads of each group are equal, leaves what it computes as it
was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.kv_fields import KVField, get_path
from gqa_convert.anatomy.shapes import ShapeDifference
from gqa_convert.anatomy.target import fields_of, retarget
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.tiny.forward import cached_logits, logits
from gqa_convert.tiny.forward import difference as logit_difference
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import shrink

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.hf.loading import Source

TOLERANCE = 1e-4
"""Largest accepted difference of a logit, as a share of the largest logit, of float32 models."""

_HEADS = 4
_GROUPS = 2


def prove_own_code(source: Source, difference: ShapeDifference) -> str:
    """Prove a conversion of a checkpoint's own code, and return a note on it.

    Args:
        source: a checkpoint whose `model_class` is its own code.
        difference: what its number of KV heads changes.

    Raises:
        UnsupportedModelError: if heads may lie otherwise than they are taken to; the message says what was seen.
    """
    reason = _wrong_axis(source.config, difference) or _wrong_on_tiny(source, 1 if difference.groups == 1 else _GROUPS)
    if reason:
        raise UnsupportedModelError(
            f"{source.folder}: its own code ({source.own_code}) cannot be converted: {reason}. Own code is converted "
            "only where a tiny model of it shows how its heads lie."
        )
    return f"own code run: {source.own_code}; a tiny model of it computes the same before and after merging equal heads"


def _wrong_axis(config: Any, difference: ShapeDifference) -> str:
    """Hold the axes that KV heads change to whole heads of a width that the configuration states; say where not."""
    counts, widths = {field.kv_heads for field in difference.fields}, _widths(config, difference.fields[0])
    for name, rows in difference.rows.items():
        shape = difference.source_shapes[name]
        one_per_head = len(shape) == 1 and rows.head_dim == 1  # such as a scale
        if rows.heads not in counts or not (rows.head_dim in widths or one_per_head):
            return (
                f"axis {rows.dim} of {name}, {shape[rows.dim]} long, is not {_either(counts)} KV heads of width "
                f"{_either(widths)}, so how heads lie in it is not known"
            )
    return ""


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _widths(config: Any, main: KVField) -> set[int]:
    """Widths of a head of keys or values that a configuration states, or else implies."""
    owner = get_path(config, main.path[:-1]) or config
    stated = (vars(owner).get(name) for name in ("head_dim", "v_head_dim", "qk_head_dim", "kv_channels", "head_size"))
    widths = {value for value in stated if isinstance(value, int) and value > 0}
    hidden = next((value for name in ("hidden_size", "d_model", "n_embd") if (value := getattr(owner, name, None))), 0)
    return widths or {int(hidden) // main.query_heads}


def _wrong_on_tiny(source: Source, groups: int) -> str:
    """Convert a tiny model of the code whose heads are equal within groups; say what is wrong, if anything is."""
    try:
        whole, merged, difference = _tiny_pair(source, groups)
        reason = _wrong_axis(whole.config, difference)
        if reason:
            return f"of a tiny model of it, {reason}"
        inputs = text_inputs(whole)
        expected, tied = logits(merged, inputs), difference.expand(merged.state_dict())
        whole.load_state_dict(tied)
        seen = logits(whole, inputs)
        moved = logit_difference(seen, expected)
        if not moved <= TOLERANCE:
            return f"merging equal heads of a tiny model of it moves its logits by {moved:.2g} of their size"
        if _decodes(whole, inputs, seen) and not _decodes(merged, inputs, expected):
            return "a tiny model of it decodes otherwise with a cache once it has fewer KV heads"
        if groups > 1:
            whole.load_state_dict(difference.expand(_exchanged(merged.state_dict(), difference)))
            if not logit_difference(logits(whole, inputs), seen) > TOLERANCE:
                return "the logits of a tiny model of it do not tell its KV heads apart"
    except Exception as error:  # the code is anybody's
        return f"it cannot be tried on a tiny model ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return ""


def _tiny_pair(source: Source, groups: int) -> tuple[Any, Any, ShapeDifference]:
    """A tiny model of the code with all its KV heads, another with `groups`, and their difference."""
    (main, *_), cls = fields_of(source.config, source.checkpoint.config, lambda: source.meta_model), source.model_class
    queries = _HEADS if main.kv_heads == main.query_heads else 2 * _HEADS
    config = shrink(source.config, num_heads=queries, num_kv_heads=_HEADS)
    values = config.to_dict()
    whole = tiny_model(config, seed=1, cls=cls)
    fields = fields_of(config, values, lambda: whole)
    if not fields or (fields[0].kv_heads, fields[0].query_heads) != (_HEADS, queries):
        raise UnsupportedModelError(f"its configuration cannot be given {queries} heads and {_HEADS} KV heads")
    _, target, target_cls = retarget(config, values, cls, fields, groups)
    merged = tiny_model(target, seed=0, cls=target_cls)
    return whole, merged, ShapeDifference(whole, merged, fields, groups)


def _decodes(model: Any, inputs: dict[str, Tensor], expected: Tensor) -> bool:
    """Whether a model gives the same logits step by step, with a cache."""
    try:
        return logit_difference(cached_logits(model, inputs)[0], expected) <= 10 * TOLERANCE
    except Exception:  # code that keeps no cache that is known here
        return False


def _exchanged(state: Mapping[str, Tensor], difference: ShapeDifference) -> dict[str, Tensor]:
    """A merged model's state with every KV head in the place of its neighbour."""
    exchanged = dict(state)
    for name, rows in difference.rows.items():
        x, merged = state[name], rows.with_heads(rows.groups)
        if merged.layout == "heads":
            exchanged[name] = x.roll(merged.head_dim, merged.dim)
        else:
            q, k, v = merged.split(x)
            exchanged[name] = merged.join(q, k.roll(merged.head_dim, merged.dim), v.roll(merged.head_dim, merged.dim))
    return exchanged
