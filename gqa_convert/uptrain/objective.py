"""Losses over a large vocabulary, a chunk of positions at a time.

Cross-entropy and distillation are computed from the hidden states and the output matrix, with their gradients, in one
pass: logits of at most `chunk` positions exist at a time, the teacher's too, and nothing is computed again in the
backward pass. Everything is a sum over the scored positions; who divides by their number divides once, globally.

Shapes: N positions, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gqa_convert.data.batches import IGNORE

STATISTICS = ("ce", "kl", "cosine")
"""What the second result of `ScoredModel` holds, in this order: sums over scored positions, in nats (cosine: 1)."""


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What is minimised: `ce_weight * CE + kl_weight * KL(teacher || model)` and hidden cosine, each a sum."""

    ce_weight: float = 1.0
    kl_weight: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    hidden_weight: float = 0.0
    chunk: int = 1024


@dataclass(frozen=True)
class Head:
    """An output matrix: `weight` (V, D) and perhaps `bias` (V). Without a weight, hidden states already are logits."""

    weight: Tensor | None
    bias: Tensor | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 logits (N, V)."""
        if self.weight is None:
            return hidden_ND.float()
        return functional.linear(hidden_ND, self.weight, self.bias).float()


@dataclass(frozen=True)
class TopLogits:
    """The K largest logits (N, K) of each position, in falling order, and the tokens that they are of."""

    values_NK: Tensor
    index_NK: Tensor

    def __getitem__(self, part: slice) -> TopLogits:
        return TopLogits(self.values_NK[part], self.index_NK[part])

    def __truediv__(self, temperature: float) -> TopLogits:
        return TopLogits(self.values_NK / temperature, self.index_NK)


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says about a micro-batch: last hidden states (N, D) with its head, and all layers' if wanted.

    With `top`, from a cache, that is all there is.
    """

    hidden_ND: Tensor
    head: Head
    layers: Sequence[Tensor] = ()
    top: TopLogits | None = None

    def said(self, part: slice) -> Tensor | TopLogits:
        """Logits of some positions, all or the largest."""
        return self.head.logits(self.hidden_ND[part]) if self.top is None else self.top[part]


def score_logits(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher_NV: Tensor | TopLogits | None,
    spec: LossSpec,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy and KL of a chunk, and the gradient of their weighted sum by the logits.

    KL is multiplied by the temperature squared, which keeps its gradient's size (Hinton et al. 2015, section 2). With
    `top_k`, the teacher's k likeliest tokens are renormalised and the model is held to its full distribution on them.

    Returns:
        CE sum, KL sum, gradient (N, V) or None.
    """
    valid_N = labels_N != IGNORE
    safe_N1 = labels_N.clamp_min(0)[:, None]
    log_s_NV = logits_NV.log_softmax(-1)
    ce = -(log_s_NV.gather(-1, safe_N1)[:, 0] * valid_N).sum()
    gradient = None
    if with_gradient and spec.ce_weight:
        # Memory of this size costs more to get than to fill, so what nobody reads again is written over.
        read_again = teacher_NV is not None and spec.kl_weight and spec.temperature == 1.0
        gradient = log_s_NV.exp() if read_again else log_s_NV.exp_()
        gradient.scatter_add_(-1, safe_N1, gradient.new_full(safe_N1.shape, -1.0))
        gradient *= (spec.ce_weight * valid_N)[:, None]
    kl = ce.new_zeros(())
    if teacher_NV is not None and spec.kl_weight:
        if spec.temperature != 1.0:
            log_s_NV = (logits_NV / spec.temperature).log_softmax(-1)
            teacher_NV = teacher_NV / spec.temperature
        kl, by_kl = _distil(log_s_NV, valid_N, teacher_NV, spec, with_gradient=with_gradient)
        if by_kl is not None:
            gradient = by_kl if gradient is None else gradient.add_(by_kl)
    return ce, kl, gradient


def _distil(
    log_s_NV: Tensor, valid_N: Tensor, teacher_NV: Tensor | TopLogits, spec: LossSpec, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL and its gradient; `log_s_NV` and the teacher's logits are already divided by the temperature.

    `log_s_NV` becomes the gradient: memory of this size costs more to get than to fill.
    """
    heat = spec.temperature
    if isinstance(teacher_NV, TopLogits):
        top, index = (x[:, : spec.top_k] for x in (teacher_NV.values_NK, teacher_NV.index_NK))
        log_t, picked = top.log_softmax(-1), log_s_NV.gather(-1, index)
    elif spec.top_k is None:
        log_t, index, picked = teacher_NV.log_softmax(-1), None, log_s_NV
    else:
        top, index = teacher_NV.topk(min(spec.top_k, teacher_NV.shape[-1]), dim=-1)
        log_t, picked = top.log_softmax(-1), log_s_NV.gather(-1, index)
    t = log_t.exp()
    kl = (torch.linalg.vecdot(t, log_t.sub_(picked)) * valid_N).sum() * heat**2
    if not with_gradient:
        return kl, None
    gradient = log_s_NV.exp_()
    if index is None:
        gradient -= t
    else:
        gradient.scatter_add_(-1, index, -t)
    gradient *= (spec.kl_weight * heat * valid_N)[:, None]
    return kl, gradient


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses; gradients by hidden states and head are computed on the way and scaled in `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels_N: Tensor,
        teacher: TeacherOutput | None,
        spec: LossSpec,
        gradients: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        by_hidden, by_weight, by_bias = gradients
        need = any(gradients)
        dtype = hidden_ND.dtype
        if weight is not None and torch.is_autocast_enabled(hidden_ND.device.type):
            dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        cast = None if weight is None else weight.to(dtype)
        head = Head(cast, None if bias is None else bias.to(dtype))
        sums = hidden_ND.new_zeros(2, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if by_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and by_bias else None
        for start in range(0, len(hidden_ND), spec.chunk):
            part = slice(start, start + spec.chunk)
            piece = hidden_ND[part] if cast is None else hidden_ND[part].to(dtype)
            taught = teacher.said(part) if teacher is not None and spec.kl_weight else None
            ce, kl, by_logits = score_logits(head.logits(piece), labels_N[part], taught, spec, with_gradient=need)
            sums += torch.stack([ce, kl])
            if by_logits is None:
                continue
            if cast is None:
                if grad_hidden is not None:
                    grad_hidden[part] = by_logits
                continue
            narrow = by_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = narrow @ cast
            if by_weight:
                grad_weight = _added(grad_weight, narrow.T, piece)
            if grad_bias is not None:
                grad_bias += by_logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return spec.ce_weight * sums[0] + spec.kl_weight * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        scale = outputs[0]
        by_hidden, by_weight, by_bias = ctx.saved_tensors  # scaled in place: autograd refuses to come here twice
        return (
            None if by_hidden is None else by_hidden.mul_(scale.to(by_hidden.dtype)),
            None if by_weight is None else by_weight.mul_(scale).to(ctx.dtypes[0]),
            None if by_bias is None else by_bias.mul_(scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right` in float32, written over `total` where there is one."""
    if total is None:
        return (left @ right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def chunked_loss(
    hidden_ND: Tensor, head: Head, labels_N: Tensor, teacher: TeacherOutput | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """Weighted loss summed over the labelled positions (differentiable), and the sums of CE and KL (2,).

    Args:
        hidden_ND: last hidden states, or logits where `head` has no weight.
        head: the model's output matrix.
        labels_N: token ids, `IGNORE` where nothing is scored.
        teacher: needed where `spec.kl_weight` is not 0.
        spec: weights, temperature, chunk length.
    """
    grads = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_ND, head.weight, head.bias)
    )
    loss, sums = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight, head.bias, labels_N, teacher, spec, grads
    )
    return loss, sums


def hidden_cosine(student: Sequence[Tensor], teacher: Sequence[Tensor], labels_N: Tensor) -> Tensor:
    """`1 - cosine` of hidden states, averaged over layers, summed over labelled positions."""
    valid_N = labels_N != IGNORE
    total = sum(
        ((1 - functional.cosine_similarity(s.float().flatten(0, -2), t.float().flatten(0, -2), dim=-1)) * valid_N).sum()
        for s, t in zip(student, teacher, strict=True)
    )
    return torch.as_tensor(total) / len(student)
