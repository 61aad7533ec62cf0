"""Carry the difference in shapes over to raw checkpoint keys: what each stored tensor must become."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gqa_convert.anatomy.head_axis import Rows
from gqa_convert.anatomy.shapes import ShapeDifference, index_of
from gqa_convert.checkpoint.dtypes import FLOATS
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.safetensors_file import TensorInfo
from gqa_convert.checkpoint.sanity import foreign_prefix
from gqa_convert.errors import CheckpointError, UnsupportedModelError
from gqa_convert.hf import api
from gqa_convert.hf.api import KeyMap

_PACKED = ("qweight", "weight_packed", "absmax", "qzeros")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One tensor to write: the raw key, the raw source keys it is made of, and how heads lie in it.

    More than one source means a list of modules, one a head (StableLM's key norms), of which only the first of each
    group keeps its place. `is_projection` tells the k and v weight matrices from biases, norms and convolutions;
    `cached` and `cached_target` are the elements a projection adds to the KV cache for each token, before and after.
    """

    key: str
    sources: tuple[str, ...]
    name: str
    rows: Rows
    shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    is_projection: bool = False
    cached: int = 0
    cached_target: int = 0


class Finder:
    """Finds the merges of one checkpoint. Results: `merges` in the checkpoint's order, `dropped` keys, `notes`."""

    def __init__(self, checkpoint: Checkpoint, difference: ShapeDifference, key_map: KeyMap | None = None) -> None:
        self.checkpoint = checkpoint
        self.difference = difference
        self.key_map = key_map or KeyMap(difference.source)
        self.merges: list[Merge] = []
        self.dropped: list[str] = []
        self.notes: list[str] = []
        self._run()

    @property
    def head_dim(self) -> int:
        """Width of one head of the first k or v projection; 0 if none was found."""
        return next((merge.rows.head_dim for merge in self.merges if merge.cached), 0)

    def _run(self) -> None:
        rows, stacks = self.difference.rows, self.difference.stacks
        covered: set[str] = set()
        unmapped: list[str] = []
        for raw_key in self.checkpoint.tensors:
            names = self.key_map.targets(raw_key)
            covered.update(names)
            if not names:
                unmapped.append(raw_key)
            elif any(name in stacks for name in names):
                self._merge_stacked(raw_key, names[0])
            elif any(name in rows for name in names):
                self._merge_raw(raw_key, names)
        tied = getattr(self.difference.source, "all_tied_weights_keys", None) or {}
        covered.update(alias for alias, original in tied.items() if original in covered)
        self._check_coverage(set(rows) | set(stacks), covered)
        self._merge_hidden_layers(unmapped)

    def _merge_raw(self, raw_key: str, names: tuple[str, ...]) -> None:
        rows = self.difference.rows
        info = self._checked(raw_key)
        one = rows[names[0]] if len(names) == 1 else self._split_rows(raw_key, names)
        if len(names) == 1:
            expected = self.difference.source_shapes[names[0]]
            if info.shape != expected:
                one = self._transposed(raw_key, info.shape, expected, one)
        elif info.shape[one.dim] != one.size:
            raise self._wrong_shape(raw_key, info.shape, f"an axis {one.dim} of {one.size}")
        self._add(raw_key, (raw_key,), names[0], one, info.shape)

    def _split_rows(self, raw_key: str, names: tuple[str, ...]) -> Rows:
        """Rows of a raw tensor that loading splits into q, k and v by the model's own sizes."""
        rows = self.difference.rows
        operations = self.key_map.operations(raw_key)
        if operations == ("Split",) and len(names) == 3 and names[0] not in rows and all(n in rows for n in names[1:]):
            k, v = rows[names[1]], rows[names[2]]
            queries = self.difference.source_shapes[names[0]][k.dim]
            if k == v and queries % k.head_dim == 0:
                return Rows(
                    dim=k.dim,
                    heads=k.heads,
                    groups=k.groups,
                    head_dim=k.head_dim,
                    layout="concat",
                    target_layout="concat",
                    query_heads=queries // k.head_dim,
                )
        raise UnsupportedModelError(
            f"{raw_key}: this tensor is cut into {', '.join(names)} while loading ({', '.join(operations)}) in a way "
            "that unequal parts do not survive."
        )

    def _transposed(self, raw_key: str, shape: tuple[int, ...], expected: tuple[int, ...], rows: Rows) -> Rows:
        if len(shape) == 2 and shape == expected[::-1] and "Transpose" in self.key_map.operations(raw_key):
            return Rows(dim=1 - rows.dim, heads=rows.heads, groups=rows.groups, head_dim=rows.head_dim)
        raise self._wrong_shape(raw_key, shape, str(expected))

    def _merge_stacked(self, raw_key: str, name: str) -> None:
        index, size = self.difference.stack_of(name)
        if name not in self.difference.target_shapes:
            self.dropped.append(raw_key)
            return
        group = self.difference.stacks[name][index * size : (index + 1) * size]
        sources = tuple(self._sibling_key(raw_key, name, other) for other in group)
        info = self._checked(raw_key)
        rows = Rows(dim=0, heads=size, groups=1, head_dim=1)
        self._add(raw_key, sources, name, rows, info.shape)

    def _sibling_key(self, raw_key: str, name: str, other: str) -> str:
        head, _, tail = raw_key.rpartition(f".{index_of(name)}.")
        key = f"{head}.{index_of(other)}.{tail}"
        if key not in self.checkpoint.tensors:
            raise CheckpointError(f"{self.checkpoint.folder}: {key} is missing beside {raw_key}.")
        return key

    def _merge_hidden_layers(self, unmapped: Iterable[str]) -> None:
        """Merge look-alikes outside the module tree: multi-token-prediction layers share the decoder's KV heads."""
        known: dict[tuple[str, tuple[int, ...]], Merge] = {}
        for merge in self.merges:
            if len(merge.sources) == 1:
                known.setdefault((_leaf(merge.key), merge.shape), merge)
        patterns = [
            re.compile(p) for p in getattr(self.difference.source, "_keys_to_ignore_on_load_unexpected", None) or ()
        ]
        hidden = 0
        by_module = {merge.key.removesuffix(".weight"): merge for merge in self.merges if merge.is_projection}
        beside = [raw_key for raw_key in unmapped if self._merge_beside(raw_key, by_module)]
        if beside:
            self.notes.append(f"{len(beside)} tensors that no code reads lie in KV heads and are merged ({beside[0]})")
        for raw_key in unmapped:
            like = known.get((_leaf(raw_key), self.checkpoint.tensors[raw_key].shape))
            if like is not None and any(p.search(raw_key) for p in patterns):
                self._checked(raw_key)
                self._add(raw_key, (raw_key,), raw_key, like.rows, like.shape, cached=False)
                hidden += 1
        if hidden:
            self.notes.append(f"{hidden} tensors of multi-token-prediction layers are merged too")

    def _merge_beside(self, raw_key: str, by_module: dict[str, Merge]) -> bool:
        """Merge a stored bias beside a k or v weight that the configuration switches off: full width would not fit."""
        module, _, leaf = raw_key.rpartition(".")
        merge, info = by_module.get(module), self.checkpoint.tensors[raw_key]
        if merge is None or leaf != "bias" or info.shape != (merge.rows.size,) or info.dtype not in FLOATS:
            return False
        self._add(raw_key, (raw_key,), raw_key, replace(merge.rows, dim=0), info.shape, cached=False)
        return True

    def _add(
        self, key: str, sources: tuple[str, ...], name: str, rows: Rows, shape: tuple[int, ...], *, cached: bool = True
    ) -> None:
        stacked = len(sources) > 1
        is_projection = not stacked and len(shape) == 2 and rows.head_dim > 1 and "norm" not in _leaf(key)
        self.merges.append(
            Merge(
                key=key,
                sources=sources,
                name=name,
                rows=rows,
                shape=shape,
                target_shape=shape if stacked else rows.target_shape(shape),
                is_projection=is_projection,
                cached=rows.kv_size if is_projection and cached else 0,
                cached_target=rows.kv_target_size if is_projection and cached else 0,
            )
        )

    def _checked(self, raw_key: str) -> TensorInfo:
        info = self.checkpoint.tensors[raw_key]
        if info.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{raw_key}: its dtype is {info.dtype}, so keys and values are quantised and cannot be averaged. "
                "Convert the unquantised checkpoint, then quantise the result."
            )
        return info

    def _check_coverage(self, needed: set[str], covered: set[str]) -> None:
        missing = sorted(needed - covered)
        if not missing:
            return
        packed = [key for key in self.checkpoint.tensors if key.endswith(_PACKED)]
        if packed:
            raise UnsupportedModelError(
                f"{self.checkpoint.folder}: {packed[0]} shows a quantised checkpoint, whose keys and values cannot be "
                "averaged. Convert the unquantised checkpoint, then quantise the result."
            )
        if self.key_map.exact_only:
            raise UnsupportedModelError(
                f"{self.checkpoint.folder}: no tensor is named {missing[0]}. The checkpoint may know it by another "
                f"name, but transformers {api.version()} does not show its renaming rules where they are "
                "looked for. Use a release that does (5.23 is one)."
            )
        raise CheckpointError(
            f"{self.checkpoint.folder}: the weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + f", which config.json ({self.difference.source.config.model_type}) calls for."
            + foreign_prefix(self.checkpoint.tensors, missing[0])
        )

    def _wrong_shape(self, raw_key: str, shape: tuple[int, ...], expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.folder}: {raw_key} has shape {shape}, but config.json calls for {expected}. "
            "Check the head counts and head_dim in config.json."
        )


def _leaf(key: str) -> str:
    return ".".join(key.split(".")[-3:])
