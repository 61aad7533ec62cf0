"""Windows and loss, against values that can be worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gqa_convert.demo.loss import encode_documents, model_loss, sample_windows
from gqa_convert.errors import UsageError


class Letters:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in text]}


class Copier:
    """A model of 5 tokens that gives the last token logit `certainty` and the others 0."""

    def __init__(self, certainty: float) -> None:
        self.certainty = certainty

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        assert options == {"use_cache": False}
        return SimpleNamespace(logits=self.certainty * torch.nn.functional.one_hot(input_ids, 5).float())


def test_documents_are_joined_by_eos() -> None:
    assert encode_documents(["ab", "", "c"], Letters()).tolist() == [1, 2, 0, 0, 3, 0]


def test_windows_lie_side_by_side_and_spread_evenly() -> None:
    stream = torch.arange(23)
    assert sample_windows(stream, length=4).tolist() == stream[:20].view(5, 4).tolist()
    assert sample_windows(stream, length=4, count=2)[:, 0].tolist() == [0, 8]


def test_short_text_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"3 tokens, less than one window of 4"):
        sample_windows(torch.arange(3), length=4)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_loss_is_the_mean_over_tokens(batch: int) -> None:
    ids_BT = torch.tensor([[1, 1, 1], [2, 2, 3], [4, 0, 4]])
    right, wrong = math.log((math.e**2 + 4) / math.e**2), math.log(math.e**2 + 4)
    assert model_loss(Copier(2.0), ids_BT, batch=batch) == pytest.approx((3 * right + 3 * wrong) / 6, abs=1e-6)
    assert model_loss(Copier(0.0), ids_BT, batch=batch) == pytest.approx(math.log(5), abs=1e-6)
