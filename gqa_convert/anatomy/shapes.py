"""Which parameters of a model depend on its number of KV heads, and how heads lie in them.

The model is built twice without memory, with the source's KV heads and with the target's; what differs in shape is
what depends on them. Works on module names; `finder` carries it over to raw checkpoint keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy import family_facts
from gqa_convert.anatomy.head_axis import Rows
from gqa_convert.anatomy.kv_fields import KVField, get_path
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.heads import Groups

if TYPE_CHECKING:
    from torch import Tensor


class ShapeDifference:
    """The difference between a model built with K and with `groups` KV heads (those of every layer, or of each).

    Attributes:
        rows: parameter name -> heads along its differing axis.
        stacks: parameter name -> the names of the list of one module a head that it belongs to (see `stack_of`).

    Raises:
        UnsupportedModelError: if a difference is none that merging heads can produce.
    """

    def __init__(self, source: Any, target: Any, fields: tuple[KVField, ...], groups: Groups) -> None:
        self.source = source
        self.fields = fields
        self.groups = groups
        self.source_shapes = {name: tuple(t.shape) for name, t in source.state_dict().items()}
        self.target_shapes = {name: tuple(t.shape) for name, t in target.state_dict().items()}
        self.rows = self._changed_rows()
        self.stacks = self._vanishing_stacks()
        if not self.rows and not self.stacks:
            raise UnsupportedModelError(
                f"{type(source).__name__}: the number of KV heads in config.json changes no weight of this model, "
                "so it cannot become a grouped-query model here."
            )

    @property
    def vanishing(self) -> frozenset[str]:
        """Parameters that the target model does not have."""
        return frozenset(self.source_shapes) - frozenset(self.target_shapes)

    def stack_of(self, name: str) -> tuple[int, int]:
        """Return the place of `name` in its list of heads and how many heads share a group there."""
        names = self.stacks[name]
        kept = sum(n in self.target_shapes for n in names)
        return names.index(name), len(names) // kept

    def expand(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn a target model's state into the source model's by repeating each KV head for its group.

        The result computes the same function: every query head reads the keys and values it read before.
        """
        expanded = {}
        for name in self.source_shapes:
            if name in self.stacks:
                index, size = self.stack_of(name)
                expanded[name] = state[self.stacks[name][index // size]]
            elif name in self.rows:
                expanded[name] = self.rows[name].expand(state[name])
            else:
                expanded[name] = state[name]
        return expanded

    def _changed_rows(self) -> dict[str, Rows]:
        rows = {}
        for name, before in self.source_shapes.items():
            after = self.target_shapes.get(name)
            if after is not None and after != before:
                rows[name] = self._rows(name, before, after)
        return rows

    def _rows(self, name: str, before: tuple[int, ...], after: tuple[int, ...]) -> Rows:
        differing = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if len(before) != len(after) or len(differing) != 1:
            raise UnsupportedModelError(
                f"{name}: its shape goes from {before} to {after} with {self.groups} KV heads. More than the heads "
                "of one axis depend on their number, so a merge would change the function."
            )
        dim = differing[0]
        size, target_size = before[dim], after[dim]
        # Fused rows first: all q, k and v may shrink by the ratio that another field has.
        fused = self._fused_rows(name, dim, size, target_size)
        if fused is not None:
            return fused
        if size % target_size == 0 and self._counts(name, size // target_size):
            head_dim = self._head_dim(name, size, target_size)
            return Rows(dim=dim, heads=size // head_dim, groups=target_size // head_dim, head_dim=head_dim)
        raise UnsupportedModelError(
            f"{name}: a fused projection whose layout is not known for {self._decoder_type()} (its axis {dim} goes "
            f"from {size} to {target_size})."
        )

    def _heads(self, field: KVField, name: str) -> tuple[int, int]:
        """KV heads of a field, before and after, in the layer of a parameter."""
        if isinstance(self.groups, int) and not field.layers:
            return field.kv_heads, field.wanted(self.groups)
        layer = layer_number(name)
        return field.at(layer), field.wanted_at(self.groups, layer)

    def _counts(self, name: str, ratio: int) -> list[int]:
        """KV heads of the fields of which one in `ratio` is left in the layer of a parameter."""
        pairs = [self._heads(field, name) for field in self.fields]
        return [before for before, after in pairs if before == ratio * after]

    def _head_dim(self, name: str, size: int, target_size: int) -> int:
        """Width of one head along an axis of `size`, from the attention module itself where it tells."""
        counts = self._counts(name, size // target_size)
        widths = [size // count for count in counts if size % count == 0 and target_size % (size // count) == 0]
        own = self._module_widths(name)
        for width in own:
            if width in widths or (not widths and size % width == 0 and target_size % width == 0):
                return width
        for width in own:  # layers with a multiple of the configured KV heads (MiMo-V2's sliding layers)
            if widths and widths[0] % width == 0 and widths[0] > width > 1 and target_size % width == 0:
                return width
        if not widths:
            raise UnsupportedModelError(f"{name}: cannot tell the heads along its axis of {size}.")
        return widths[0]

    def _module_widths(self, name: str) -> list[int]:
        """Head widths that the modules owning a parameter declare, the nearest first."""
        leaf = name.rsplit(".", 2)[-2] if name.count(".") >= 1 else name
        names = ("v_head_dim", "head_dim") if leaf.startswith("v") else ("head_dim", "head_size")
        widths: list[int] = []
        path = name.split(".")[:-1]
        while path and len(widths) < 4:
            module = self.source.get_submodule(".".join(path))
            widths += [w for w in (getattr(module, n, None) for n in names) if isinstance(w, int) and w > 0]
            path = path[:-1]
        return widths

    def _fused_rows(self, name: str, dim: int, size: int, target_size: int) -> Rows | None:
        """The rows of a fused projection of a family whose layout is known; None if this is none."""
        main = self.fields[0]
        heads, groups = self._heads(main, name)
        layouts = family_facts.fused_layouts(self._decoder_type(), main.query_heads, heads)
        gone = 2 * (heads - groups)
        if layouts is None or gone <= 0 or (size - target_size) % gone:
            return None
        rows = Rows(
            dim=dim,
            heads=heads,
            groups=groups,
            head_dim=(size - target_size) // gone,
            layout=layouts[0],
            target_layout=layouts[1],
            query_heads=main.query_heads,
        )
        return rows if rows.size == size and rows.target_size == target_size else None

    def _decoder_type(self) -> str:
        owner = get_path(self.source.config, self.fields[0].path[:-1])
        model_type = getattr(owner, "model_type", "") or self.source.config.model_type
        return str(self.source.config.model_type if model_type not in family_facts.FUSED_LAYOUTS else model_type)

    def _vanishing_stacks(self) -> dict[str, tuple[str, ...]]:
        """Return, for each parameter of a one-module-a-head list that gets shorter, the names of the whole list."""
        gone = [name for name in self.source_shapes if name not in self.target_shapes]
        stacks: dict[str, tuple[str, ...]] = {}
        for prefix, suffix in dict.fromkeys(index_split(name) for name in gone):
            names = [n for n in self.source_shapes if index_split(n) == (prefix, suffix)]
            names.sort(key=lambda n: index_of(n))
            kept = sum(n in self.target_shapes for n in names)
            if not prefix or not kept or len(names) % kept:
                raise UnsupportedModelError(
                    f"{gone[0]}: it vanishes with {self.groups} KV heads, and not as one of a list of heads."
                )
            stacks.update(dict.fromkeys(names, tuple(names)))
        return stacks


def layer_number(name: str) -> int:
    """The number of the decoder layer that a parameter lies in: the first number in its name."""
    return int(next((part for part in name.split(".") if part.isdigit()), "0"))


def index_split(name: str) -> tuple[str, str]:
    """Cut a name at its last module index: `a.norms.3.weight` -> (`a.norms`, `weight`); no index gives (``, name)."""
    match = re.fullmatch(r"(.*)\.(\d+)\.([^.]+)", name)
    return (match.group(1), match.group(3)) if match else ("", name)


def index_of(name: str) -> int:
    """The last module index in a name: `a.norms.3.weight` -> 3."""
    return int(name.rsplit(".", 2)[-2])
