"""Look into a layer while it runs: what its attention modules and their projections are given, and give back.

Shape suffixes: B batch, T tokens, X width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Names(Protocol):
    """Paths of one attention block's modules; `gqa_convert.anatomy.block_names.BlockNames` is one."""

    @property
    def module(self) -> str:
        """The attention module."""
        ...

    @property
    def layer(self) -> str:
        """The layer that holds it."""
        ...

    @property
    def q(self) -> str:
        """The query projection, or the fused one."""
        ...

    @property
    def k(self) -> str:
        """The key projection, or the fused one."""
        ...

    @property
    def v(self) -> str:
        """The value projection, or the fused one."""
        ...

    @property
    def o(self) -> str:
        """The output projection."""
        ...


def part_of(root: nn.Module, root_path: str, path: str) -> nn.Module:
    """Return the module at `path` of the whole model, found under `root`, which is at `root_path`."""
    return root.get_submodule(path.removeprefix(root_path).removeprefix("."))


class Enough(Exception):
    """Ends a layer's run when all that was wanted of it is there."""


@dataclass
class BlockRecord:
    """What one attention block did, a list entry a call; empty lists where nothing was asked for."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Arguments of the attention module."""
    outputs: list[Tensor] = field(default_factory=list)
    """Outputs of the o projection, (B, T, X) each."""


@contextmanager
def watching(
    root: nn.Module,
    root_path: str,
    names: Names,
    *,
    record: BlockRecord | None = None,
    keep: Callable[[Any], Any] | None = None,
    on_inputs: Callable[[Tensor, Tensor], None] | None = None,
    on_heads: Callable[[Tensor], None] | None = None,
    on_output: Callable[[Tensor], Tensor | None] | None = None,
    call_arguments: bool = True,
    stop: bool = False,
) -> Iterator[None]:
    """Watch one attention block for the duration of a `with` block.

    Args:
        root: the layer (or any module that holds the block).
        root_path: its path in the model.
        names: the block.
        record: filled with calls and outputs.
        keep: applied to what is recorded (moving it to the CPU or to a file).
        on_inputs: called with the inputs of the q and of the k projection, once a call; the same object where both
            read the same.
        on_heads: called with the input of the o projection: the heads' outputs side by side.
        on_output: called with the output of the o projection; what it returns, if anything, takes its place.
        call_arguments: record the attention module's arguments too, not only outputs.
        stop: raise `Enough` once the arguments are recorded.
    """
    handles: list[Any] = []
    seen: dict[str, Tensor] = {}
    hold = keep or (lambda value: value)

    def before_attention(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if record is not None and call_arguments:
            record.calls.append(hold((args, dict(kwargs))))
        if stop:
            raise Enough

    def before_projection(which: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[which] = args[0]

        return hook

    def after_attention(_: nn.Module, args: Any, out: Any) -> None:
        q, k = seen.pop("q"), seen.pop("k", None)
        assert on_inputs is not None
        same = k is None or (k.data_ptr() == q.data_ptr() and k.shape == q.shape)
        on_inputs(q, q if same or k is None else k)

    def before_output(_: nn.Module, args: tuple[Any, ...]) -> None:
        assert on_heads is not None
        on_heads(args[0])

    def after_output(_: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if record is not None:
            record.outputs.append(hold(out.detach().clone()))
        return on_output(out) if on_output else None

    attention, o = (part_of(root, root_path, path) for path in (names.module, names.o))
    try:
        if record is not None and call_arguments:
            handles.append(attention.register_forward_pre_hook(before_attention, with_kwargs=True))
        if on_inputs is not None:
            for which, path in {"q": names.q, "k": names.k}.items():
                if which == "q" or path != names.q:
                    part = part_of(root, root_path, path)
                    handles.append(part.register_forward_pre_hook(before_projection(which)))
            handles.append(attention.register_forward_hook(after_attention))
        if on_heads is not None:
            handles.append(o.register_forward_pre_hook(before_output))
        if record is not None or on_output is not None:
            handles.append(o.register_forward_hook(after_output))
        yield
    finally:
        for handle in handles:
            handle.remove()
