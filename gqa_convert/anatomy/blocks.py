"""Attention blocks: which modules of a model are one layer's q, k, v and o, and how to read and write them as one.

Found from the parameters that depend on KV heads; the q and o projections are their neighbours. Whether a block found
so really computes attention in the way its view claims is proven on a tiny model (`gqa_convert.anatomy.freedom`).

Shape suffixes: H query heads, K KV heads, D head_dim of q and k, V head_dim of v, X input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.block_names import BlockNames, Freedom
from gqa_convert.anatomy.head_axis import Rows
from gqa_convert.anatomy.shapes import ShapeDifference
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.heads import merge_heads, split_heads

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.block import AttentionBlock, RotaryLayout

    Get = Callable[[str], Tensor | None]

# How families spell the neighbours of a key projection.
_QUERY_SPELLINGS = (("k_proj", "q_proj"), ("key", "query"), ("to_k", "to_q"), ("wk", "wq"), ("k", "q"))
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "to_out", "wo", "o", "c_proj", "out", "attn_out", "proj")


def find_blocks(difference: ShapeDifference) -> tuple[BlockNames, ...]:
    """Return the attention blocks whose KV heads the difference changes, in the model's order.

    Raises:
        UnsupportedModelError: if a k projection has no q, v and o beside it that this view understands.
    """
    projections = {
        name.removesuffix(".weight"): rows
        for name, rows in difference.rows.items()
        if name.endswith(".weight") and len(difference.source_shapes[name]) == 2 and "norm" not in name.split(".")[-2]
    }
    blocks = []
    for path, rows in projections.items():
        if rows.layout != "heads":
            blocks.append(_fused_block(difference, path, rows))
        elif _is_key(path):
            blocks.append(_separate_block(difference, path, rows, projections))
    if not blocks:
        raise UnsupportedModelError(f"{type(difference.source).__name__}: no key projection was recognised.")
    return tuple(blocks)


def _is_key(path: str) -> bool:
    return any(_swap(path, old, new) is not None for old, new in _QUERY_SPELLINGS)


def _swap(path: str, old: str, new: str) -> str | None:
    """Replace a path component that is `old` (or ends in `_old`), searching from the end; None if there is none."""
    parts = path.split(".")
    for index in range(len(parts) - 1, max(-1, len(parts) - 3), -1):
        if parts[index] == old or parts[index].endswith(f"_{old}"):
            return ".".join([*parts[:index], parts[index].removesuffix(old) + new, *parts[index + 1 :]])
    return None


def _separate_block(difference: ShapeDifference, key: str, rows: Rows, projections: Mapping[str, Rows]) -> BlockNames:
    for old, new in _QUERY_SPELLINGS:
        query = _swap(key, old, new)
        value = _swap(key, old, new.replace("query", "value").replace("q", "v"))
        if query and value and value in projections and _shape(difference, query):
            break
    else:
        raise UnsupportedModelError(f"{key}: no query and value projection stands beside it.")
    shape_q = _shape(difference, query)
    heads = shape_q[0] // rows.head_dim if shape_q else 0
    if not shape_q or shape_q[0] % rows.head_dim or heads % rows.heads:
        raise UnsupportedModelError(f"{query}: its shape {shape_q} is not one of whole heads of {rows.head_dim}.")
    attention = _common_parent(query, value)
    return BlockNames(
        module=attention,
        layer=_layer_of(difference, attention),
        q=query,
        k=key,
        v=value,
        o=_output(difference, attention, heads * projections[value].head_dim, {query, key, value}),
        query_heads=heads,
        kv_heads=rows.heads,
        groups=rows.groups,
    )


def _fused_block(difference: ShapeDifference, path: str, rows: Rows) -> BlockNames:
    attention = path.rpartition(".")[0]
    return BlockNames(
        module=attention,
        layer=_layer_of(difference, attention),
        q=path,
        k=path,
        v=path,
        o=_output(difference, attention, rows.query_heads * rows.head_dim, {path}),
        query_heads=rows.query_heads,
        kv_heads=rows.heads,
        groups=rows.groups,
        fused=rows,
    )


def _shape(difference: ShapeDifference, path: str) -> tuple[int, ...]:
    return difference.source_shapes.get(f"{path}.weight", ())


def _common_parent(a: str, b: str) -> str:
    parts: list[str] = []
    for left, right in zip(a.split("."), b.split("."), strict=False):
        if left != right:
            break
        parts.append(left)
    return ".".join(parts)


def _output(difference: ShapeDifference, attention: str, width: int, others: set[str]) -> str:
    candidates: list[str] = []
    for name, shape in difference.source_shapes.items():
        path = name.removesuffix(".weight")
        if name == path or path in others or not path.startswith(attention + "."):
            continue
        if len(shape) == 2 and shape[1] == width:
            candidates.append(path)
    if not candidates and attention.endswith(".self"):  # BERT's lies beside the module that computes attention
        return _output(difference, attention.removesuffix(".self"), width, others)
    for wanted in _OUTPUT_NAMES:
        for path in candidates:
            if wanted in path.removeprefix(attention + ".").split("."):
                return path
    raise UnsupportedModelError(f"{attention}: no output projection of {width} inputs was recognised in it.")


def _layer_of(difference: ShapeDifference, attention: str) -> str:
    """The outermost list entry that holds an attention module: the decoder layer."""
    parts = attention.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return attention


def rotary_layouts(model: Any, freedom: Freedom) -> dict[str, RotaryLayout]:
    """Return the rotary layout of every attention layer type: `""` for all, or by the type's name.

    `model` may be on the meta device: the rotary modules are built anew from their configuration, on the CPU.

    Raises:
        UnsupportedModelError: if the architecture turns its keys but no frequencies are found.
    """
    import torch

    from gqa_convert.merge.block import RotaryLayout

    if freedom.rotary_kind == "none":
        return {"": RotaryLayout()}
    layouts: dict[str, RotaryLayout] = {}
    for name, module in model.named_modules():
        buffers = {
            n: b for n, b in module.named_buffers(recurse=False) if n.endswith("inv_freq") and "original" not in n
        }
        if not buffers or "vision" in name or "audio" in name:
            continue
        with torch.device("cpu"):
            real = type(module)(module.config)
        for buffer in buffers:
            frequencies = tuple(float(f) for f in getattr(real, buffer).flatten())
            kind = freedom.rotary_kind
            layouts[buffer.removesuffix("inv_freq").removesuffix("_")] = RotaryLayout(
                kind=kind, rotary_dim=2 * len(frequencies), inv_freq=frequencies
            )
    if not layouts:
        raise UnsupportedModelError(f"{type(model).__name__}: it turns its keys, but its frequencies were not found.")
    return layouts


def layout_for(names: BlockNames, model: Any, layouts: Mapping[str, RotaryLayout]) -> RotaryLayout:
    """Choose one block's rotary layout: by the layer's type where the model has several.

    Raises:
        UnsupportedModelError: if there are several and the layer does not say which is its own.
    """
    if len(set(layouts.values())) == 1:
        return next(iter(layouts.values()))
    module = model.get_submodule(names.module)
    kind = getattr(module, "layer_type", None)
    types = getattr(getattr(module, "config", None), "layer_types", None)
    if kind is None and types is not None and getattr(module, "layer_idx", None) is not None:
        kind = types[module.layer_idx]
    if isinstance(kind, str) and kind in layouts:
        return layouts[kind]
    raise UnsupportedModelError(f"{names.module}: which of {sorted(layouts)} its rotary frequencies are is not known.")


def read_block(get: Get, names: BlockNames, freedom: Freedom, rotary: RotaryLayout) -> AttentionBlock:
    """Read one layer's q, k, v and o as an `AttentionBlock` of float32 tensors.

    `get` returns a parameter by module name, or None where there is none (an absent bias).
    """
    from gqa_convert.merge.block import AttentionBlock

    parts = {part: _read_projection(get, names, part) for part in ("weight", "bias")}
    out = _oriented(names, _float(get(f"{names.o}.weight")))
    if out is None or parts["weight"] is None:
        raise UnsupportedModelError(f"{names.module}: its projections could not be read.")
    q, k, v = parts["weight"]
    biases = parts["bias"] or (None, None, None)
    return AttentionBlock(
        w_q=q,
        w_k=k,
        w_v=v,
        w_o=split_heads(out, names.query_heads, 1),
        b_q=biases[0],
        b_k=biases[1],
        b_v=biases[2],
        b_o=_float(get(f"{names.o}.bias")),
        rotary=rotary,
        key_gauge=freedom.key_gauge,
        value_gauge=freedom.value_gauge,
        shift_invariant=freedom.shift_invariant,
    )


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float()


def _oriented(names: BlockNames, x: Tensor | None) -> Tensor | None:
    """A weight as (out, in); a bias as it is."""
    return None if x is None else _stored(names, x)


def _read_projection(get: Get, names: BlockNames, part: str) -> tuple[Any, Any, Any] | None:
    """q, k and v of one kind of parameter, each with a head axis first; None where all are absent."""
    counts = (names.query_heads, names.kv_heads, names.kv_heads)
    if names.fused is not None:
        fused = _oriented(names, _float(get(f"{names.q}.{part}")))
        if fused is None:
            return None
        cut = replace(names.fused, dim=0).split(fused)
        return tuple(split_heads(x, n) for x, n in zip(cut, counts, strict=True))  # type: ignore[return-value]
    parameters = [_float(get(f"{path}.{part}")) for path in (names.q, names.k, names.v)]
    if all(x is None for x in parameters):
        return None
    return tuple(  # type: ignore[return-value]
        None if x is None else split_heads(x, n) for x, n in zip(parameters, counts, strict=True)
    )


def _stored(names: BlockNames, x: Tensor) -> Tensor:
    """An (out, in) weight as the module stores it; a bias as it is."""
    return x.T.contiguous() if names.transposed and x.dim() == 2 else x


def block_state(names: BlockNames, block: AttentionBlock) -> dict[str, Tensor]:
    """Turn a block back into parameters by module name; a merged block into those of the target model.

    Biases that a merge needs but the module has no place for are refused where the block is made, not here.
    """
    state = {f"{names.o}.weight": _stored(names, merge_heads(block.w_o, 1))}
    if block.b_o is not None:
        state[f"{names.o}.bias"] = block.b_o
    kinds = {"weight": (block.w_q, block.w_k, block.w_v), "bias": (block.b_q, block.b_k, block.b_v)}
    for part, (q, k, v) in kinds.items():
        if names.fused is not None:
            if q is not None and k is not None and v is not None:
                rows = replace(names.fused.with_heads(block.num_kv_heads), dim=0)
                joined = rows.join(merge_heads(q), merge_heads(k), merge_heads(v))
                state[f"{names.q}.{part}"] = _stored(names, joined)
            continue
        for path, tensor in ((names.q, q), (names.k, k), (names.v, v)):
            if tensor is not None:
                state[f"{path}.{part}"] = merge_heads(tensor)
    return state
