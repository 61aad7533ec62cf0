import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_between_marks_the_loss_goes_by_the_logarithm_of_tokens() -> None:
    from curves import loss_at

    curve = [(0, 6.0), (100, 5.0), (10_000, 3.0)]
    assert loss_at(curve, 0) == 6.0
    assert loss_at(curve, 25) == pytest.approx(5.75)  # before the first mark: by tokens
    assert loss_at(curve, 1000) == pytest.approx(4.0)
    assert loss_at(curve, 10_000) == 3.0
    with pytest.raises(ValueError, match="ends at 10000"):
        loss_at(curve, 10_001)


def test_the_first_crossing_counts() -> None:
    from curves import tokens_to_reach

    curve = [(0, 6.0), (100, 5.0), (200, 5.5), (400, 4.0)]
    assert tokens_to_reach(curve, 7.0) == 0
    assert tokens_to_reach(curve, 5.0) == pytest.approx(100)
    assert tokens_to_reach(curve, 5.25) == pytest.approx(75)
    assert 200 < tokens_to_reach(curve, 4.75) < 400
    assert tokens_to_reach(curve, 3.9) is None


falling = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8).map(
    lambda drops: [(0 if i == 0 else 10.0 * 3**i, 10.0 - sum(drops[:i])) for i in range(len(drops))]
)


@given(falling, st.floats(0.0, 1.0))
def test_reading_a_falling_curve_forth_and_back_comes_home(curve: list[tuple[float, float]], share: float) -> None:
    from curves import loss_at, tokens_to_reach

    target = curve[0][1] + (curve[-1][1] - curve[0][1]) * share
    tokens = tokens_to_reach(curve, target)
    assert tokens is not None
    assert loss_at(curve, min(tokens, curve[-1][0])) == pytest.approx(target, abs=1e-6)


def test_the_interval_is_students() -> None:
    from curves import geometric_interval, interval

    values = [1.0, 2.0, 6.0]
    inside = interval(values)
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert (inside.mean, inside.low, inside.high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert not inside.excludes_zero
    assert interval([5.0, 5.1]).excludes_zero
    alone = interval([4.0])
    assert (alone.mean, alone.low, alone.high) == (4.0, None, None)
    assert not alone.excludes_zero
    ratio = geometric_interval([1.0, 10.0, 100.0])
    assert ratio.mean == pytest.approx(10)
    assert ratio.low * ratio.high == pytest.approx(100)
    with pytest.raises(ValueError, match="0 values"):
        interval([])
