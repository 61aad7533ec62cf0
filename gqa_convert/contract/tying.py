"""KV heads of a family without a setting for their number, averaged within groups in its own layout.

The converter does none of this: these few lines are its yardstick for families that it writes as another family. A
model whose heads are averaged here computes what the converted model must compute, with all its heads.

Shape suffixes: H heads, D head_dim, X input width, T the three of q, k and v, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def average_heads(model: Any, groups: int) -> None:
    """Replace every KV head of `model`, in place, by the mean of the adjacent heads of its group.

    Raises:
        KeyError: if the layout of the model's family is not known here.
    """
    import torch

    heads = model.config.num_attention_heads
    with torch.no_grad():
        for view in _LAYOUTS[model.config.model_type](model, heads):
            flat = view.reshape(groups, heads // groups, -1)
            mean = flat.double().mean(1, keepdim=True).to(view.dtype)
            view.copy_(mean.expand_as(flat).reshape(view.shape))


def _gpt_neox(model: Any, heads: int) -> Iterator[Tensor]:
    for layer in model.gpt_neox.layers:
        fused = layer.attention.query_key_value
        for x in filter(lambda x: x is not None, (fused.weight, fused.bias)):
            yield from x.data.view(heads, 3, -1, *x.shape[1:])[:, 1:].unbind(1)


def _separate(model: Any, heads: int) -> Iterator[Tensor]:
    names = (".k_proj.weight", ".v_proj.weight", ".k_proj.bias", ".v_proj.bias")
    for name, x in model.named_parameters():
        if name.endswith(names):
            yield x.data


def _codegen(model: Any, heads: int) -> Iterator[Tensor]:
    for block in model.transformer.h:
        rows_BTHDX = block.attn.qkv_proj.weight.data.view(4, 3, heads // 4, -1, model.config.n_embd)
        yield from rows_BTHDX[:, 1:].unbind(1)


def _gpt2(model: Any, heads: int) -> Iterator[Tensor]:
    for block in model.transformer.h:
        weight, bias = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
        yield from weight.view(-1, 3, heads, weight.shape[0] // heads).permute(1, 2, 3, 0)[1:]
        yield from bias.view(3, heads, -1)[1:]


_LAYOUTS: dict[str, Callable[[Any, int], Iterator[Tensor]]] = {
    "codegen": _codegen,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _separate,
    "opt": _separate,
}
