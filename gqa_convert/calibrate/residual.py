"""How an attention block's output enters the residual stream, found by running the layer: no family is listed.

In most layers the stream after attention is h + m a, with h the layer's input, a the output of the o projection and m
a number (1, or a residual multiplier). Then an error that the stream already carries can be taken off a's target.
Where a norm follows a, or h feeds something else too (parallel layers), it cannot, and the proof below fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.hooks import Names, watching

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gqa_convert.calibrate.paused_forward import LayerCall

_TOLERANCE = 2e-3  # of float32 differences between two runs of a layer


def hidden_of(call: LayerCall) -> Tensor | None:
    """Return the hidden states that a layer call carries: its first floating tensor, or the one named so."""
    import torch

    named = call.kwargs.get("hidden_states")
    for value in (*call.args, named):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def with_hidden(call: LayerCall, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with other hidden states."""
    old = hidden_of(call)
    args = tuple(hidden if value is old else value for value in call.args)
    return args, {name: hidden if value is old else value for name, value in call.kwargs.items()}


def residual_scale(layer: nn.Module, path: str, names: Names, call: LayerCall) -> float | None:
    """Return m where the layer's result depends on h and a only through h + m a; None where it does not.

    The layer is run a few times on one call, in its own dtype (float32 for the proof to mean anything).
    """
    import torch

    h = hidden_of(call)
    outputs: list[Tensor] = []
    with torch.no_grad():
        args, kwargs = with_hidden(call, h) if h is not None else (call.args, call.kwargs)
        with watching(layer, path, names, on_output=lambda out: outputs.append(out.clone())):
            _first(layer(*args, **kwargs))
        if h is None or len(outputs) != 1 or outputs[0].shape != h.shape:
            return None
        a = outputs[0]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(h.shape, generator=generator).to(h) * (0.01 * h.square().mean().sqrt())

        def result(on_h: float, on_a: float) -> Tensor:
            args, kwargs = with_hidden(call, h + on_h * noise)
            with watching(layer, path, names, on_output=lambda _: a + on_a * noise):
                return _first(layer(*args, **kwargs)).double()

        still, by_a, by_h = result(0, 0), result(0, 1), result(1, 0)
        scale = 0.0
        change, slope = by_a - still, by_h - still
        power, wanted = float(slope.square().sum()), float(change.square().sum())
        if not power or not wanted:
            return None
        gap = change
        for _ in range(4):
            scale += float((gap * slope).sum()) / power
            gap = result(-scale, 1) - still
        small = float(gap.square().sum()) <= _TOLERANCE**2 * wanted
    return scale if small and abs(scale) > 1e-3 else None


def _first(out: Any) -> Tensor:
    output: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return output
