"""What is said of blocks that a refit could not bring near to the original."""

from __future__ import annotations

from gqa_convert.calibrate.report import POOR, BlockReport, poor_blocks_line


def block(name: str, before: float, after: float | None, fitted: float | None = None) -> BlockReport:
    return BlockReport(
        module=name,
        grouping=((0,),),
        key_residual=0.1,
        value_residual=0.1,
        error_before=before,
        error_after_descent=after,
        error_on_fitted=fitted,
    )


def test_blocks_that_stay_far_away_are_named_worst_first_with_what_helps() -> None:
    reports = [block("a", 0.9, 0.3), block("b", 0.9, 0.1), block("c", 2.0, 1.09)]
    line = poor_blocks_line(reports)
    assert line is not None
    assert line.index("c 109%") < line.index("a 30%")
    assert "b " not in line.split("):")[1].split(",")[0]
    assert "--refit-steps" in line
    assert "--preset heal" in line
    assert "of 3 blocks" in line


def test_text_that_was_learnt_by_heart_asks_for_more_text_and_not_for_more_steps() -> None:
    line = poor_blocks_line([block("a", 0.9, 0.4, 0.08), block("b", 0.9, 0.2, 0.04)])
    assert line is not None
    assert "it is 6% on average" in line
    assert "--calibration-sequences" in line
    assert "--refit-steps" not in line
    near = poor_blocks_line([block("a", 0.9, 0.4, 0.3)])
    assert near is not None
    assert "--refit-steps" in near


def test_many_are_counted_and_not_listed() -> None:
    line = poor_blocks_line([block(f"layer.{i}", 1.0, 0.5) for i in range(30)])
    assert line is not None
    assert "26 more" in line


def test_nothing_is_said_where_all_are_near_or_nothing_was_measured() -> None:
    assert poor_blocks_line([block("a", 0.9, POOR)]) is None
    unmeasured = BlockReport(module="a", grouping=((0,),), key_residual=None, value_residual=None)
    assert poor_blocks_line([unmeasured]) is None
