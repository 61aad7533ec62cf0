"""How much attention each token receives while a source's layer runs.

A key that no query looks at may be approximated as badly as one likes. So the closed forms count a token's key by the
attention that it receives from all queries of all heads (own derivation; `docs/merging.md` has what it brings).

Shape suffixes: B batch, T queries' tokens, S keys' tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_SDPA = "sdpa"
_ROUNDING = 1e-2
"""By how much a row of attention weights may exceed 1: bfloat16's rounding."""


class Attended:
    """What the watched attention modules' keys have received since it was last taken."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._watched = {id(module) for module in modules}
        self._received: dict[int, Tensor] = {}

    def watches(self, module: nn.Module) -> bool:
        """Whether this is one of the modules."""
        return id(module) in self._watched

    def has(self, module: nn.Module) -> bool:
        """Whether something is there to be taken."""
        return id(module) in self._received

    def add(self, module: nn.Module, received_BS: Tensor) -> None:
        """Add what one attention function call gave to each key."""
        before = self._received.get(id(module))
        same = before is not None and before.shape == received_BS.shape
        self._received[id(module)] = before + received_BS if same and before is not None else received_BS

    def take(self, module: nn.Module) -> Tensor | None:
        """Return the attention that each key received, (B, S), summed over heads and queries; None if none was seen."""
        return self._received.pop(id(module), None)


@contextmanager
def attention_received(modules: Iterable[nn.Module]) -> Iterator[Attended]:
    """See how much attention the keys of these attention modules receive, for the duration of a `with` block.

    Modules whose attention is transformers' sdpa function are seen by a derivative: the sum of attention weights over
    queries is that of the sum of outputs by a value, whatever masks, biases and shared heads there are, and no matrix
    of T by S need exist. Of others the weights that they return are summed, if they do; the rest is not seen.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    watched = tuple(modules)
    attended = Attended(watched)
    real = ALL_ATTENTION_FUNCTIONS[_SDPA]
    with ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(_from_weights(attended)).remove)
        stack.callback(AttentionInterface.register, _SDPA, real)
        AttentionInterface.register(_SDPA, _measuring(real, attended))
        yield attended


def _measuring(real: Callable[..., Any], attended: Attended) -> Callable[..., Any]:
    """An attention function that gives the same, and adds to `attended`."""
    import torch

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not attended.watches(module):
            return real(module, query, key, value, *args, **kwargs)
        # out_t = sum_s a_ts v_s, so d(sum_t out_t)/d v_s = sum_t a_ts: the attention that key s receives.
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            out, weights = real(module, query.detach(), key.detach(), leaf, *args, **kwargs)
            (slope,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        attended.add(module, slope[..., 0].float().sum(1))  # any dim of the value would do; over KV heads
        return out.detach(), weights

    return forward


def _from_weights(attended: Attended) -> Callable[..., None]:
    """A forward hook that looks for attention weights (B, heads, T, S) in what a module returns."""

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if attended.has(module) or not isinstance(out, tuple):
            return
        for part in out[1:]:
            if _is_attention(part):
                attended.add(module, part.detach().float().sum((1, 2)))
                return

    return hook


def _is_attention(part: Any) -> bool:
    import torch

    if not isinstance(part, torch.Tensor) or part.dim() != 4 or not part.is_floating_point():
        return False
    rows = part.detach().float().sum(-1)
    return bool(part.min() >= 0) and bool(rows.max() <= 1 + _ROUNDING) and bool(rows.max() > 0)
