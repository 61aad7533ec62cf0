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

_IN_CACHE = 2**17
"""Logits that a processor core takes at a time: with the teacher's and what lies between, 1.5 MiB."""


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
        """Float32 logits (N, V), which the caller may write over."""
        if self.weight is None:
            return hidden_ND.to(torch.float32, copy=True)
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

    Both logits are written over: memory of this size costs more to get than to fill. On a processor a few positions are
    taken at a time, so that the dozen passes over their logits find them in its cache.

    KL is multiplied by the temperature squared, which keeps its gradient's size (Hinton et al. 2015, section 2). With
    `top_k`, the teacher's k likeliest tokens are renormalised and the model is held to its full distribution on them.

    Returns:
        CE sum, KL sum, gradient (N, V) or None.
    """
    positions, words = logits_NV.shape
    rows = max(1, positions)
    if logits_NV.device.type == "cpu":
        rows = max(1, _IN_CACHE * torch.get_num_threads() // words)
    ce, kl = [], []
    for start in range(0, max(1, positions), rows):
        part = slice(start, start + rows)
        taught = None if teacher_NV is None or not spec.kl_weight else teacher_NV[part]
        one = _score_rows(logits_NV[part], labels_N[part], taught, spec, with_gradient=with_gradient)
        ce.append(one[0])
        kl.append(one[1])
    return torch.stack(ce).sum(), torch.stack(kl).sum(), logits_NV if with_gradient else None


def _score_rows(
    logits_RV: Tensor, labels_R: Tensor, teacher: Tensor | TopLogits | None, spec: LossSpec, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Sums of CE and KL of R positions; the gradient is left in `logits_RV`."""
    valid_R = labels_R != IGNORE
    heat = spec.temperature
    if teacher is None or heat == 1.0:
        weights = (spec.ce_weight, spec.kl_weight)
        return _at_one_heat(logits_RV, labels_R, valid_R, teacher, weights, spec.top_k, with_gradient=with_gradient)
    cooled_RV = logits_RV / heat
    weights = (0.0, spec.kl_weight * heat)  # heat squared, and 1 / heat from the division
    _, kl = _at_one_heat(cooled_RV, labels_R, valid_R, teacher / heat, weights, spec.top_k, with_gradient=with_gradient)
    weights = (spec.ce_weight, 0.0)
    ce, _ = _at_one_heat(logits_RV, labels_R, valid_R, None, weights, None, with_gradient=with_gradient)
    if with_gradient:
        logits_RV += cooled_RV
    return ce, kl * heat**2


def _at_one_heat(
    s_RV: Tensor,
    labels_R: Tensor,
    valid_R: Tensor,
    teacher: Tensor | TopLogits | None,
    weights: tuple[float, float],
    top_k: int | None,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """CE and KL of logits that are divided by the temperature already, with one exponential of each side's logits.

    With s and t the logits less their maximum: KL = sum(p_t (t - s)) - log sum exp t + log sum exp s.
    """
    by_ce, by_kl = weights
    safe_R1 = labels_R.clamp_min(0)[:, None]
    s_RV -= s_RV.amax(-1, keepdim=True)
    at_label = s_RV.gather(-1, safe_R1)[:, 0]
    index, gap, size_t = None, None, None
    if teacher is not None:
        index, t = _likeliest(teacher, top_k)
        t -= t.amax(-1, keepdim=True)
        p_t = t.exp()
        size_t = p_t.sum(-1)
        t -= s_RV if index is None else s_RV.gather(-1, index)
        gap = torch.linalg.vecdot(p_t, t) / size_t
    p_s = s_RV.exp_()
    size_s = p_s.sum(-1)
    log_size = size_s.log()
    ce = ((log_size - at_label) * valid_R).sum()
    kl = ce.new_zeros(()) if gap is None or size_t is None else ((gap - size_t.log() + log_size) * valid_R).sum()
    if with_gradient:
        p_s *= ((by_ce + (by_kl if teacher is not None else 0.0)) * valid_R / size_s)[:, None]
        if size_t is not None:
            p_t *= (by_kl * valid_R / size_t)[:, None]
            if index is None:
                p_s -= p_t
            else:
                p_s.scatter_add_(-1, index, p_t.neg_())
        if by_ce:
            p_s.scatter_add_(-1, safe_R1, (-by_ce * valid_R.to(p_s.dtype))[:, None])
    return ce, kl


def _likeliest(teacher: Tensor | TopLogits, top_k: int | None) -> tuple[Tensor | None, Tensor]:
    """Tokens and logits that the model is held to: the teacher's largest, or (None) all of them."""
    if isinstance(teacher, TopLogits):
        return teacher.index_NK[:, :top_k], teacher.values_NK[:, :top_k].clone()
    if top_k is None:
        return None, teacher
    top = teacher.topk(min(top_k, teacher.shape[-1]), dim=-1)
    return top.indices, top.values


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
