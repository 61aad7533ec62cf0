"""Products in bfloat16 where a processor is quick in it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gqa_convert.calibrate.quick import quick_products


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_convert.calibrate.quick.has_bfloat16", lambda kind: True)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_query_that_may_read_nothing_reads_all_alike(by_name: bool) -> None:
    """As in float32: the least float32 is no infinity, though bfloat16 would round it to one."""
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min)
    with quick_products("cpu"):
        if by_name:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=0, atol=0.02)


def test_arguments_may_be_named() -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    with quick_products("cpu"):
        out = functional.linear(input=x, weight=weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, functional.linear(x, weight), rtol=0, atol=0.1)
    assert not torch.equal(out, functional.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_what_they_are(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    with quick_products("cpu"):
        inside = functional.linear(x, weight)
    assert torch.equal(inside, functional.linear(x, weight))
