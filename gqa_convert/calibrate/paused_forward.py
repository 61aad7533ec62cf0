"""Forward passes that stop at every layer, so that a whole calibration set can go through a model a layer at a time.

Each batch has its own forward pass, in a thread that sleeps while it waits for a layer's result; exactly one thread
runs at any time. So the model's own code decides what every layer is given (masks, rotary tables, another layer's keys,
a position bias that the first layer made), and nothing about a family need be known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_current = threading.local()


@dataclass
class LayerCall:
    """One call of one layer, as the model makes it."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stopped(BaseException):
    """Unwinds a forward pass that is no longer wanted."""


class Lane:
    """One forward pass. `call` is the layer call that it waits for; None once it has ended, with its `result`."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.call: LayerCall | None = None
        self.result: Any = None
        self._forward = forward
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._value: Any = None
        self._error: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="forward pass", daemon=True)

    def start(self) -> None:
        """Run up to the first layer call.

        Raises:
            Exception: whatever the forward pass raises.
        """
        import torch

        threads = torch.get_num_threads()
        self._thread.start()
        self._wait()
        torch.set_num_threads(threads)  # the lane's own setting has become the default of threads to come

    def advance(self, value: Any) -> None:
        """Give the layer's result and run up to the next layer call, or to the end. Raises like `start`."""
        self._value = value
        self._go.release()
        self._wait()

    def close(self) -> None:
        """End the forward pass wherever it is."""
        if self._thread.is_alive():
            self._stopping = True
            self._go.release()
            self._thread.join()
        self.call = None

    def stop_at(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in the lane's own thread in the place of a layer: wait for that layer's result and return it."""
        self.call = LayerCall(path, args, kwargs)
        del args, kwargs  # the caller of `advance` decides how long the layer's inputs live
        self._back.release()
        self._go.acquire()
        self.call = None
        if self._stopping:
            raise _Stopped
        value, self._value = self._value, None
        return value

    def _wait(self) -> None:
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        import torch

        _current.lane = self
        torch.set_num_threads(1)  # the work is in the layers, which do not run here; many idle pools would be waste
        try:
            with torch.no_grad():
                self.result = self._forward()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.call = None
            self._back.release()


def intercept(model: nn.Module, paths: Iterable[str]) -> Callable[[], None]:
    """Make the modules at `paths` stop the lane that calls them; called from anywhere else they work as ever.

    Returns:
        A function that undoes it.
    """
    modules = [(path, model.get_submodule(path)) for path in paths]
    for path, module in modules:
        module.forward = _interceptor(path, module.forward)

    def undo() -> None:
        for _, module in modules:
            with suppress(AttributeError):
                del module.forward

    return undo


def _interceptor(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        lane: Lane | None = getattr(_current, "lane", None)
        if lane is None:
            return original(*args, **kwargs)
        return lane.stop_at(path, args, kwargs)

    return forward
