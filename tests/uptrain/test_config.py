from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gqa_convert.errors import UsageError
from gqa_convert.uptrain.config import ScheduleSection
from gqa_convert.uptrain.plan import plan_rows, resolve
from gqa_convert.uptrain.read_config import apply_overrides, load_config, parse_config
from gqa_convert.uptrain.schedule import Schedule

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_every_problem_is_reported_at_once_with_what_was_meant(settings: dict[str, Any]) -> None:
    settings["trian"] = {}
    settings["train"]["microbatch"] = 2
    settings["train"]["precision"] = "fp7"
    settings["schedule"]["peak"] = -1
    del settings["model"]
    with pytest.raises(UsageError) as caught:
        parse_config(settings)
    text = str(caught.value)
    for expected in (
        "5 problems",
        "trian: unknown. Did you mean train?",
        "train.microbatch: unknown. Did you mean micro_batch?",
        "train.precision='fp7'",
        "schedule.peak=-1",
        "model: must be set",
    ):
        assert expected in text


def test_a_source_can_be_named_by_one_word(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for word, expected in {
        str(tmp_path / "a.jsonl"): ("jsonl", (str(tmp_path / "a.jsonl"),), None, "train"),
        str(tmp_path): ("folder", (str(tmp_path),), None, "train"),
        "owner/name": ("hub", ("owner/name",), None, "train"),
        "owner/name:part:other": ("hub", ("owner/name",), "part", "other"),
    }.items():
        settings["data"]["source"] = word
        source = parse_config(settings).data.source
        assert (source.kind, source.paths, source.config_name, source.split) == expected
    settings["data"]["source"] = str(tmp_path / "b.jsonl")
    with pytest.raises(UsageError, match=r"data\.source.*b\.jsonl: no such file"):
        parse_config(settings)


def test_settings_that_do_not_fit_together_are_reported_together(settings: dict[str, Any]) -> None:
    settings["train"]["micro_batch"] = 3
    settings["data"]["held_out_fraction"] = 0
    with pytest.raises(UsageError, match=r"(?s)no multiple.*nothing is held out"):
        parse_config(settings)


def test_overrides_are_yaml_by_dotted_name(settings: dict[str, Any], write_config: Callable[..., Path]) -> None:
    loaded = load_config(
        write_config(settings),
        ["budget.steps=null", "budget.tokens=2k", "optimizer.betas=[0.8, 0.9]", "log.trackers=auto"],
    )
    assert (loaded.budget.steps, loaded.budget.tokens, loaded.optimizer.betas) == (None, 2048, (0.8, 0.9))
    with pytest.raises(UsageError, match=r"section\.key=value"):
        apply_overrides({}, ["budget.steps"])
    with pytest.raises(UsageError, match=r"budget\.stepz: unknown\. Did you mean steps"):
        load_config(write_config(settings), ["budget.stepz=1"])


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", ""])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.budget.steps or loaded.budget.tokens or loaded.budget.pretraining or loaded.budget.pretraining_tokens


def test_the_plan_resolves_and_prints(settings: dict[str, Any]) -> None:
    settings["budget"] = {"alpha": 0.1, "pretraining_tokens": 12_800}
    resolved = resolve(parse_config(settings))
    assert (resolved.horizon.steps, resolved.horizon.tokens) == (10, 1280)
    rows = dict(plan_rows(resolved))
    assert "10 steps of 128 tokens (from alpha, alpha 0.1)" in rows["horizon"]
    assert resolved.to_json()["budget"]["tokens"] == 1280


def test_an_output_inside_the_model_is_refused(settings: dict[str, Any]) -> None:
    settings["output"] = settings["model"] + "/run"
    with pytest.raises(UsageError, match="apart"):
        resolve(parse_config(settings))


def schedule(**settings: Any) -> Schedule:
    return Schedule(ScheduleSection(**settings), total_tokens=1000, batch_tokens=10)


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    rate = schedule(kind="cosine", peak=2.0, warmup_fraction=0.1, final_fraction=0.25)
    assert rate(50) == pytest.approx(1.0)
    assert rate(100) == pytest.approx(2.0)
    assert rate(550) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert rate(1000) == pytest.approx(0.5)
    assert rate(2000) == pytest.approx(0.5)


def test_linear_warms_up_and_falls_straight_to_its_floor() -> None:
    rate = schedule(kind="linear", peak=2.0, warmup_fraction=0.2, final_fraction=0.5)
    assert [rate(t) for t in (100, 200, 400, 600, 1000, 2000)] == pytest.approx([1.0, 2.0, 1.75, 1.5, 1.0, 1.0])


def test_wsd_is_flat_then_falls() -> None:
    rate = schedule(kind="wsd", peak=1.0, warmup_tokens=10, decay_fraction=0.2, final_fraction=0.0)
    assert [rate(t) for t in (5, 10, 400, 800)] == pytest.approx([0.5, 1, 1, 1])
    assert rate(900) == pytest.approx(0.5)
    assert rate(1000) == 0


def test_the_papers_schedule_goes_on_from_a_million_steps() -> None:
    rate = schedule(kind="inverse_sqrt", peak=1.0, start_step=1_000_000)
    assert rate(0) == pytest.approx(1e-3)
    assert rate(1000) == pytest.approx((1_000_100) ** -0.5)
    fresh = schedule(kind="inverse_sqrt", peak=1.0)
    assert fresh(10) == pytest.approx(0.01)  # the first 10,000 steps stand at 1/100
    assert schedule(kind="constant", peak=3.0)(7) == 3.0
