from pathlib import Path
from typing import Any

import pytest

from tests.reproduce.made_results import TOTAL


@pytest.fixture
def findings(seeds_found: dict[int, dict[str, Any]]) -> Any:
    from findings import Findings

    return Findings(seeds_found, TOTAL)


def test_a_start_below_the_goal_gives_a_bound_and_no_ratio(
    findings: Any, seeds_found: dict[int, dict[str, Any]]
) -> None:
    saving = findings.saving("best-mqa-kd", "mean-mqa-ce")
    assert saving.starts_there
    assert saving.ratio.mean == pytest.approx(50_000 / 1000)  # nothing below the first evaluation is resolved
    assert saving.ratio_with_calibration.mean == pytest.approx(50_000 / 4000)
    # 1 s of converting and no uptraining, against 1 s and 10 s for 100,000 tokens, of which half.
    assert saving.time_ratio.mean == pytest.approx(6.0)


def test_a_ratio_is_taken_seed_by_seed(findings: Any, seeds_found: dict[int, dict[str, Any]]) -> None:
    saving = findings.saving("pca-mqa-ce", "mean-mqa-ce")
    assert saving.reached
    assert not saving.starts_there
    assert all(5000 < tokens < 50_000 for tokens in saving.needed)
    assert 1 < saving.ratio.low <= saving.ratio.mean <= saving.ratio.high < 10
    assert saving.ratio_with_calibration.mean < saving.ratio.mean


def test_one_seed_that_never_arrives_leaves_no_ratio(findings: Any, seeds_found: dict[int, dict[str, Any]]) -> None:
    seeds_found[1]["arms"]["pca-mqa-ce"]["curve"] = [[0, 9.0], [50_000, 8.0]]
    saving = findings.saving("pca-mqa-ce", "mean-mqa-ce")
    assert saving.needed[1] is None
    assert (saving.ratio, saving.ratio_with_calibration, saving.time_ratio) == (None, None, None)


def test_the_gap_is_to_the_control_at_the_same_alpha(findings: Any) -> None:
    assert findings.gap("mean-mqa-ce", 0.0).mean == pytest.approx(3.0)
    assert findings.closed("mean-mqa-ce", 0.0).mean == pytest.approx(0.0)
    assert 0.9 < findings.closed("mean-mqa-ce", 0.05).mean < 1.0


def test_the_order_is_claimed_only_where_it_is_seen(findings: Any, seeds_found: dict[int, dict[str, Any]]) -> None:
    import words

    assert "holds.**" in words.order_of_figure_4(findings)
    for seed in seeds_found:
        arms = seeds_found[seed]["arms"]
        arms["mean-mqa-ce"]["curve"], arms["first-mqa-ce"]["curve"] = (
            arms["first-mqa-ce"]["curve"], arms["mean-mqa-ce"]["curve"],
        )  # fmt: skip
    assert "does not hold" in words.order_of_figure_4(findings)


def test_what_one_seed_lacks_is_compared_for_none(findings: Any, seeds_found: dict[int, dict[str, Any]]) -> None:
    del seeds_found[2]["pretraining"]["small"]
    del seeds_found[2]["arms"]["pca-mqa-ce"]
    assert findings.sizes() == ["large"]
    assert not findings.has("pca-mqa-ce")
    assert findings.arms("gqa") == ["mean-gqa-ce", "best-gqa-kd", "best-gqa-ce"]


def test_the_page_and_the_figures_are_written_from_results(results: dict[str, Any], tmp_path: Path) -> None:
    from results_page import render

    render(results, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    for expected in ("Figure 4", "Figure 5", "Figure 6", "Table 1", "at least 50", "1,000 steps of 10 x 100", "2 + 2"):
        assert expected in page
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    for name in names:
        assert f"figures/{name}" in page
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert len(names) == 7


def test_seconds_are_said_to_be_whose_they_are(results: dict[str, Any]) -> None:
    from results_page import findings, page

    families = {name: findings(results, name) for name in results["families"]}
    assert "Processor minutes of all seeds: decoder 3, t5 3." in page(results, families)
    seeds = results["families"]["t5"]
    results["families"]["t5"] = seeds | {"1": seeds["1"] | {"processor_seconds": None}}
    said = page(results, families)
    assert "What t5 took in all was not recorded" in said
    assert "all seeds: decoder 3. " in said


def test_what_one_command_took_is_said_where_one_command_made_it_all(results: dict[str, Any]) -> None:
    from results_page import findings, page, shown

    families = {name: findings(results, name) for name in results["families"]}
    assert "by one command" not in page(results, families)
    results["in_one_go"] = {"minutes": 15.52, "jobs": 2}
    assert "by one command in 15.5 minutes, 2 processes side by side" in page(results, families)
    assert shown(["--report", "--out", "/somewhere"]) == ["--out", "runs/reproduce"]
