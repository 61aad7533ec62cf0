"""What a layer's conversion costs, estimated from one backward pass and one block forward per layer and count.

To second order the divergence that a change e of one block's output causes is half the expected square of g . e, with
g the gradient of the log-likelihood of tokens drawn from the model itself (its Fisher information). Two estimates, in
nats per token, up to a factor that does not change ranks:

- `fisher`: half the sum over tokens of (g_t . e_t)^2, over the tokens: errors of different tokens taken as independent.
- `local`: the block's squared error over its squared output, the usual local error, which knows nothing of logits.

Shapes: B windows, T tokens, X hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.evaluate.allocation import BATCH, Assembly
from gqa_convert.evaluate.examples import batches


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention of every decoder layer, first to last."""
    modules = [module for name, module in model.named_modules() if name.endswith((".self_attn", ".attn", ".attention"))]
    if not modules:
        raise SystemExit("no module is called self_attn, attn or attention: proxies need those blocks")
    return modules


def proxies(assembly: Assembly, wanted: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """Estimate the cost of each (layer, KV heads) alone.

    Returns:
        `fisher` and `local`, a number for each of `wanted`, and `seconds`.
    """
    started = time.monotonic()
    original = assembly.put({})
    blocks = attention_modules(original)
    seen: list[list[tuple[Any, Any, Tensor, Tensor]]] = [[] for _ in blocks]
    tokens = 0
    draw = torch.Generator().manual_seed(seed)
    for batch in batches(assembly.examples, BATCH):
        calls: dict[int, tuple[Any, Any, Tensor]] = {}

        def keep(number: int) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                y_BTX = output[0] if isinstance(output, tuple) else output
                y_BTX.retain_grad()
                calls[number] = (_detached(args), _detached(kwargs), y_BTX)  # noqa: B023

            return hook

        handles = [block.register_forward_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
        logits = original(**batch.inputs, use_cache=False).logits.float()
        for handle in handles:
            handle.remove()
        chances = logits.detach().softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=draw)
        total = logits.log_softmax(-1).flatten(0, 1).gather(1, drawn).sum()
        total.backward()
        tokens += drawn.numel()
        for number, (args, kwargs, y_BTX) in calls.items():
            assert y_BTX.grad is not None
            seen[number].append((args, kwargs, y_BTX.detach(), y_BTX.grad))
        original.zero_grad(set_to_none=True)
    fisher, local = [], []
    for layer, count in wanted:
        block = attention_modules(assembly.put({layer: count}))[layer]
        moved = error = size = 0.0
        with torch.no_grad():
            for args, kwargs, y_BTX, g_BTX in seen[layer]:
                output = block(*args, **kwargs)
                e_BTX = (output[0] if isinstance(output, tuple) else output) - y_BTX
                moved += 0.5 * (g_BTX * e_BTX).sum(-1).square().sum().item()
                error += e_BTX.square().sum().item()
                size += y_BTX.square().sum().item()
        fisher.append(moved / tokens)
        local.append(error / size)
    return {"fisher": fisher, "local": local, "seconds": round(time.monotonic() - started, 1)}


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(each) for each in value)
    return value
