"""What is known of a layer's input, where little of it was seen."""

from __future__ import annotations

import torch

from gqa_convert.merge.statistics import ENOUGH, Statistics

WIDTH = 6


def samples(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def test_moments_of_few_tokens_forget_no_direction() -> None:
    few = Statistics.from_samples(samples(3))
    assert int(torch.linalg.matrix_rank(few.covariance)) == 2
    steadied = few.steadied
    assert int(torch.linalg.matrix_rank(steadied.covariance)) == WIDTH
    assert torch.equal(steadied.mean, few.mean)
    grown = float(steadied.covariance.trace() / few.covariance.trace())
    assert 1 < grown < 1.02


def test_moments_of_enough_tokens_stand_for_themselves() -> None:
    enough = Statistics.from_samples(samples(ENOUGH * WIDTH))
    assert torch.equal(enough.steadied.moment, enough.moment)
    assert torch.equal(Statistics.identity(WIDTH).steadied.moment, torch.eye(WIDTH, dtype=torch.float64))


def test_keys_and_values_are_judged_by_their_own_tokens() -> None:
    few, enough = Statistics.from_samples(samples(3)), Statistics.from_samples(samples(100))
    both = Statistics(moment=enough.moment, mean=enough.mean, count=100, kv=few).steadied
    assert torch.equal(both.moment, enough.moment)
    assert both.kv is not None
    assert int(torch.linalg.matrix_rank(both.kv.covariance)) == WIDTH
