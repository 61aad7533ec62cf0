from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gqa_convert.data.batches import IGNORE
from gqa_convert.uptrain import objective
from gqa_convert.uptrain.objective import Head, LossSpec, TeacherOutput, chunked_loss, hidden_cosine

N, D, V = 37, 8, 50
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, TeacherOutput]
"""Hidden states, weight and bias of a head, labels, and the output of a teacher."""


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    labels[::5] = IGNORE
    teacher = TeacherOutput(torch.randn(N, 12, dtype=torch.float64), Head(torch.randn(V, 12, dtype=torch.float64)))
    return hidden, weight, bias, labels, teacher


def plain(
    leaves: Sequence[torch.Tensor], labels: torch.Tensor, teacher: Any, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, bias = leaves
    logits = functional.linear(hidden, weight, bias)
    valid = labels != IGNORE
    ce = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    heat = spec.temperature
    taught = functional.linear(teacher.hidden_ND, teacher.head.weight) / heat
    log_s = (logits / heat).log_softmax(-1)
    if spec.top_k:
        taught, index = taught.topk(spec.top_k)
        log_s = log_s.gather(-1, index)
    t = taught.softmax(-1)
    kl = heat**2 * ((t * (t.log() - log_s)).sum(-1) * valid).sum()
    return spec.ce_weight * ce + spec.kl_weight * kl, ce, kl


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize(
    "weights",
    [
        {"ce_weight": 1.0},
        {"ce_weight": 0.0, "kl_weight": 1.0},
        {"ce_weight": 0.3, "kl_weight": 0.7, "temperature": 3.0},
        {"ce_weight": 0.5, "kl_weight": 1.0, "temperature": 2.0, "top_k": 4},
    ],
    ids=["ce", "kl", "both", "top_k"],
)
@pytest.mark.parametrize("in_cache", [1, 4 * V, 2**17], ids="{} logits in cache".format)
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    case: Case, weights: dict[str, Any], chunk: int, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_IN_CACHE", in_cache)
    *leaves, labels, teacher = case
    spec = LossSpec(chunk=chunk, **weights)
    expected, ce, kl = plain(leaves, labels, teacher, spec)
    wanted = torch.autograd.grad(expected * 1.7, leaves)
    hidden, weight, bias = leaves
    loss, sums = chunked_loss(hidden, Head(weight, bias), labels, teacher, spec)
    gradients = torch.autograd.grad(loss * 1.7, leaves)
    # Logits are float32 by design, so agreement is that of float32.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums[0].item() == pytest.approx(ce.item(), rel=1e-5)
    if spec.kl_weight:
        assert sums[1].item() == pytest.approx(kl.item(), rel=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_logits_of_the_model_itself_are_scored_in_chunks_too(case: Case) -> None:
    hidden, weight, bias, labels, _ = case
    spec = LossSpec(chunk=8)
    logits = functional.linear(hidden, weight, bias).detach().float().requires_grad_()
    before = logits.detach().clone()
    loss, _ = chunked_loss(logits, Head(None), labels, None, spec)
    assert torch.equal(logits, before)
    expected = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    a, b = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0]
    assert (a - b).abs().max() < 1e-6


def test_a_frozen_head_gets_no_gradient_and_evaluation_computes_none(case: Case) -> None:
    hidden, weight, _, labels, teacher = case
    frozen = weight.detach()
    loss, _ = chunked_loss(hidden, Head(frozen), labels, None, LossSpec())
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        loss, sums = chunked_loss(hidden, Head(weight), labels, teacher, LossSpec(kl_weight=1.0))
    assert not loss.requires_grad
    assert (sums > 0).all()


def test_going_backward_twice_is_refused_since_gradients_are_scaled_in_place(case: Case) -> None:
    hidden, weight, bias, labels, _ = case
    loss, _ = chunked_loss(hidden, Head(weight, bias), labels, None, LossSpec(chunk=10))
    (loss / 3).backward(retain_graph=True)
    kept = hidden.grad.clone() if hidden.grad is not None else None
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
    assert kept is not None
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, kept)


def test_a_model_equal_to_its_teacher_has_no_divergence(case: Case) -> None:
    hidden, weight, *_, labels, _ = case
    teacher = TeacherOutput(hidden.detach(), Head(weight.detach()))
    loss, sums = chunked_loss(hidden, Head(weight), labels, teacher, LossSpec(ce_weight=0, kl_weight=1))
    assert abs(sums[1].item()) < 1e-4
    loss.backward()
    assert hidden.grad.abs().max() < 1e-5


class Largest(TorchDispatchMode):
    """The largest float32 tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("top_k", [None, 5])
def test_logits_of_all_positions_never_exist_at_once(top_k: int | None) -> None:
    count, vocabulary, width, chunk = 512, 4000, 16, 32
    hidden = torch.randn(count, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
    teacher = TeacherOutput(
        torch.randn(count, width, dtype=torch.bfloat16), Head(torch.randn(vocabulary, width, dtype=torch.bfloat16))
    )
    spec = LossSpec(ce_weight=0.5, kl_weight=1.0, chunk=chunk, top_k=top_k)
    with Largest() as seen:  # type: ignore[no-untyped-call]
        loss, _ = chunked_loss(hidden, Head(weight), torch.randint(0, vocabulary, (count,)), teacher, spec)
        loss.backward()
    assert seen.elements <= chunk * vocabulary


def test_hidden_cosine_is_zero_for_equal_states_and_ignores_what_is_not_scored() -> None:
    states = [torch.randn(2, 5, 8) for _ in range(3)]
    labels = torch.zeros(10, dtype=torch.long)
    assert hidden_cosine(states, states, labels).item() == pytest.approx(0, abs=1e-5)
    other = [-x for x in states]
    labels[:4] = IGNORE
    assert hidden_cosine(states, other, labels).item() == pytest.approx(2 * 6, rel=1e-5)
