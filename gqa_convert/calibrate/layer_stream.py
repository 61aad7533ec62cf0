"""Run calibration batches through a model one layer at a time.

In memory: one layer's weights, what lies outside the layers, and the activations of all batches: what each batch gives
the current layer and, once that has run, what it gets back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gqa_convert.calibrate.activations import Spill, to_device
from gqa_convert.calibrate.paused_forward import Lane, LayerCall, intercept
from gqa_convert.calibrate.quick import quick_products
from gqa_convert.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Inputs = Mapping[str, "Tensor"]
"""Arguments of one forward pass by name."""


class Parts(Protocol):
    """A model whose layers can be had one at a time."""

    model: Any
    layers: tuple[str, ...]

    def load(self, path: str, device: torch.device | str = "cpu") -> nn.Module:
        """Make a layer ready to run on `device`."""
        ...

    def release(self, path: str) -> None:
        """Give the layer's memory back."""
        ...


@dataclass
class LayerWindow:
    """One layer, its weights in memory, and the calls that every batch makes of it.

    The calls hold what the layer is really given. After `run()`, the outputs move on to the next layer.
    """

    index: int
    path: str
    module: nn.Module
    calls: list[LayerCall]
    device: torch.device
    spill: Spill | None = None
    quick: bool = False
    """Products as in `gqa_convert.calibrate.quick`."""
    outputs: list[Any] | None = field(default=None, repr=False)

    def computing(self) -> AbstractContextManager[Any]:
        """The arithmetic in which this layer runs, for a `with` block."""
        return quick_products(self.device) if self.quick else nullcontext()

    def run(self, module: nn.Module | None = None) -> list[Any]:
        """Run all calls, without gradients, and return the layer's outputs on the CPU.

        Another `module` may stand in for the layer; then the stream's own course is not affected.
        """
        import torch

        outputs = []
        with torch.no_grad(), self.computing():
            for call in self.calls:
                args, kwargs = to_device((call.args, call.kwargs), self.device)
                out = to_device((module or self.module)(*args, **kwargs), torch.device("cpu"))
                outputs.append(self.spill.keep(out) if self.spill else out)
        if module is None:
            self.outputs = outputs
        return outputs


class LayerStream:
    """Iterate over a model's layers in the order in which it calls them, with every batch's calls; see `LayerWindow`.

    Args:
        parts: the model.
        inputs: the arguments of one forward pass a batch.
        device: where layers run; everything else is computed and kept on the CPU.
        spill: what to do with activations beyond a memory limit.
        quick: whether layers may run in quicker, coarser arithmetic (`gqa_convert.calibrate.quick`).
        last: path of the layer after which to stop.
        keep_results: keep what the forward passes return, in `results`, when they have ended.

    Raises:
        UnsupportedModelError: while iterating: if the model cannot be run on these inputs, or the batches do not call
            the same layers in the same order.
    """

    def __init__(
        self,
        parts: Parts,
        inputs: Sequence[Inputs],
        *,
        device: torch.device | str = "cpu",
        spill: Spill | None = None,
        quick: bool = False,
        last: str | None = None,
        keep_results: bool = False,
    ) -> None:
        import torch

        self.parts = parts
        self.inputs = inputs
        self.device = torch.device(device)
        self.spill = spill
        self.quick = quick
        self.last = last
        self.keep_results = keep_results
        self.results: list[Any] = []

    def __iter__(self) -> Generator[LayerWindow, None, None]:
        undo = intercept(self.parts.model, self.parts.layers)
        lanes = [Lane(self._forward(inputs)) for inputs in self.inputs]
        try:
            self._start(lanes)
            yield from self._windows(lanes)
            self.results = [lane.result for lane in lanes]
        finally:
            for lane in lanes:
                lane.close()
            undo()

    def _start(self, lanes: list[Lane]) -> None:
        try:
            for lane in lanes:
                lane.start()
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise UnsupportedModelError(
                f"{type(self.parts.model).__name__}: cannot be run on text alone, so it cannot be calibrated "
                f"({type(error).__name__}: {text})."
            ) from error

    def _windows(self, lanes: list[Lane]) -> Iterator[LayerWindow]:
        index = 0
        while (path := self._next(lanes)) is not None:
            if self.spill:
                self.spill.reset()
            window = LayerWindow(
                index=index,
                path=path,
                module=self.parts.load(path, self.device),
                calls=[lane.call for lane in lanes if lane.call is not None],
                device=self.device,
                spill=self.spill,
                quick=self.quick,
            )
            yield window
            if path == self.last:
                self.parts.release(path)
                return
            outputs = window.outputs if window.outputs is not None else window.run()
            window.outputs, window.calls = None, []
            self.parts.release(path)
            outputs.reverse()
            for lane in lanes:
                lane.advance(outputs.pop())
            index += 1

    def _next(self, lanes: list[Lane]) -> str | None:
        paths = {lane.call.path if lane.call else None for lane in lanes}
        if len(paths) != 1:
            raise UnsupportedModelError(
                f"{type(self.parts.model).__name__}: its batches go through different layers "
                f"({', '.join(sorted(map(str, paths)))}), so they cannot be calibrated layer by layer."
            )
        return paths.pop()

    def _forward(self, inputs: Inputs) -> Callable[[], Any]:
        from gqa_convert.tiny.forward import speaker

        def forward() -> Any:
            result = speaker(self.parts.model)(**inputs, use_cache=False)
            return result if self.keep_results else None

        return forward
