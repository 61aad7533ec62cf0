"""How KV heads lie in each parameter of a model, worked out from two builds alone, and the two ways between them.

`expand` writes every KV head several times, `pool` averages runs of heads. The converter does neither here: these few
lines are its yardstick, and are themselves held to the mark by the logits (an expanded model must compute the same).

Shape suffixes: K heads of the larger build, G of the smaller, R = K / G, H query heads, D head_dim.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

# With all heads, fused rows are [q k v] head by head; with fewer, [q | k | v].
PER_HEAD = ("bloom", "falcon", "gpt_bigcode", "gpt_neox_japanese", "persimmon")
STACKED = re.compile(r"(.*)\.(\d+)\.([^.]+)")


@dataclass(frozen=True)
class KVAxes:
    """Two builds of one architecture that differ in KV heads only: `large` with K of them, `small` with G."""

    large: nn.Module
    small: nn.Module
    heads: int
    groups: int

    @property
    def ratio(self) -> int:
        """R, the heads of the larger build for each of the smaller."""
        return self.heads // self.groups

    def expand(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the larger build that computes what `state` of the smaller one does."""
        stacks = self._stacks()
        expanded = {}
        for name, like in self.large.state_dict().items():
            prefix, index, leaf = _place(name)
            if (prefix, leaf) in stacks:
                expanded[name] = state[f"{prefix}.{index // self.ratio}.{leaf}"]
            elif state[name].shape == like.shape:
                expanded[name] = state[name]
            else:
                expanded[name] = self._expand_one(name, state[name], like)
        return expanded

    def pool(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the smaller build whose every KV head is the mean of R adjacent heads of `state`."""
        stacks = self._stacks()
        pooled = {}
        for name, like in self.small.state_dict().items():
            prefix, index, leaf = _place(name)
            if (prefix, leaf) in stacks:
                run = range(index * self.ratio, (index + 1) * self.ratio)
                pooled[name] = torch.stack([state[f"{prefix}.{i}.{leaf}"] for i in run]).mean(0)
            elif state[name].shape == like.shape:
                pooled[name] = state[name]
            else:
                pooled[name] = self._pool_one(name, state[name], like)
        return pooled

    def changed(self) -> set[str]:
        """Return the names of the larger build's parameters that depend on KV heads."""
        small = {name: tensor.shape for name, tensor in self.small.state_dict().items()}
        return {name for name, tensor in self.large.state_dict().items() if small.get(name) != tensor.shape}

    def _expand_one(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        dim = _differing(x, like)
        if like.shape[dim] == self.ratio * x.shape[dim]:
            return _repeat(x, dim, self._width(name, x.shape[dim]), self.ratio)
        width, queries = self._fused(like.shape[dim], x.shape[dim])
        q, k, v = x.split([queries * width, self.groups * width, self.groups * width], dim)
        k, v = (_repeat(part, dim, width, self.ratio) for part in (k, v))
        if self._per_head():
            heads = [part.unflatten(dim, (self.heads, width)) for part in (q, k, v)]
            return torch.stack(heads, dim + 1).flatten(dim, dim + 2)
        return torch.cat([q, k, v], dim)

    def _pool_one(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        dim = _differing(x, like)
        if x.shape[dim] == self.ratio * like.shape[dim]:
            return _mean(x, dim, self._width(name, like.shape[dim]), self.ratio)
        width, queries = self._fused(x.shape[dim], like.shape[dim])
        if self._per_head():
            q, k, v = (part.flatten(dim, dim + 1) for part in x.unflatten(dim, (self.heads, 3, width)).unbind(dim + 1))
        else:
            q, k, v = x.split([queries * width, self.heads * width, self.heads * width], dim)
        return torch.cat([q, *(_mean(part, dim, width, self.ratio) for part in (k, v))], dim)

    def _width(self, name: str, size: int) -> int:
        """Return D on an axis of `size` in the smaller build: by its attention module's count or width, or G heads."""
        widths = ("v_head_dim", "head_dim") if ".v_" in name else ("head_dim",)
        path = name.split(".")[:-1]
        while path:
            module: Any = self.small.get_submodule(".".join(path))
            heads = getattr(module, "num_key_value_heads", None)
            if isinstance(heads, int) and size % heads == 0:
                return size // heads
            for width in (getattr(module, own, None) for own in widths):
                if isinstance(width, int) and size % (width * self.groups) == 0:
                    return width
            path.pop()
        return size // self.groups

    def _fused(self, large: int, small: int) -> tuple[int, int]:
        """Return D and H of a fused axis, from the 2 (K - G) D elements by which the builds differ."""
        width = (large - small) // (2 * (self.heads - self.groups))
        return width, large // width - 2 * self.heads

    def _per_head(self) -> bool:
        config: Any = self.large.config
        return config.model_type in PER_HEAD

    def _stacks(self) -> set[tuple[str, str]]:
        """Return the lists of one module a head, as (name of the list, parameter): the smaller build's are shorter."""
        gone = self.large.state_dict().keys() - self.small.state_dict().keys()
        return {(prefix, leaf) for prefix, _, leaf in map(_place, gone)}


def _place(name: str) -> tuple[str, int, str]:
    """Cut a name at its last module index, `a.norms.3.weight` -> (`a.norms`, 3, `weight`); index -1 if it has none."""
    match = STACKED.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else (name, -1, "")


def _differing(a: Tensor, b: Tensor) -> int:
    dims = [dim for dim, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y]
    if len(dims) != 1:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ in more than one axis")
    return dims[0]


def _repeat(x: Tensor, dim: int, width: int, times: int) -> Tensor:
    repeated: Tensor = x.unflatten(dim, (-1, width)).repeat_interleave(times, dim).flatten(dim, dim + 1)
    return repeated


def _mean(x: Tensor, dim: int, width: int, times: int) -> Tensor:
    # in float64, where the sum of equal float32 values is exact for any number of heads
    pooled: Tensor = x.double().unflatten(dim, (-1, times, width)).mean(dim + 1).flatten(dim, dim + 1).to(x.dtype)
    return pooled
