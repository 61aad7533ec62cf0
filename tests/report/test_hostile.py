"""A run folder may come from anybody: nothing outside it is touched, nothing in it becomes markup or a traceback."""

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gqa_convert.checkpoint.ownership import sign_card
from gqa_convert.errors import GQAConvertError, UsageError
from gqa_convert.report import writing
from gqa_convert.report.card import card
from gqa_convert.report.collect import read_run
from gqa_convert.report.drawings import DRAWINGS
from gqa_convert.report.page import page
from gqa_convert.report.words import verdict
from gqa_convert.report.writing import write_report
from tests.report.make_run import bench, comparison, evaluation, write_run
from tests.report.test_report import SORTING, Outline, scripts

pytest.importorskip("matplotlib", reason="the report extra is not installed")
from matplotlib.figure import Figure

SCRIPT = '"><script>alert(1)</script>'
FILES = ("sweep.json", "sensitivity.json", "similarity.json", "eval.json", "bench.json", "points/pca-g2/point.json")
HOSTILE: list[Any] = [
    SCRIPT, "$\\frac{", "\ud800", "\u202e\x00", "../../victim", -1, 0, 1e308, float("nan"), float("inf"), 10**400, None,
    True, [], {}, [[[]]], {"a": SCRIPT}, "x" * 5000,
]  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "draw_all", lambda run, folder: {})


@pytest.mark.parametrize(
    "name", ["../../victim", "/tmp/victim", "..", ".", "", ".hidden", "a/b", "a\\b", "a\nb", "a\0b", "x" * 300]
)
def test_a_point_is_named_as_a_folder_of_the_run(tmp_path: Path, name: str, undrawn: None) -> None:
    run = write_run(tmp_path / "deep" / "run")
    victim = tmp_path / "victim" / "model"
    victim.mkdir(parents=True)
    sweep = json.loads((run / "sweep.json").read_text())
    sweep["points"][0]["name"] = name
    (run / "sweep.json").write_text(json.dumps(sweep))
    with pytest.raises(UsageError, match=r"sweep\.json: points\.0: name .*") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert list(victim.iterdir()) == []
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("link", ["points/pca-g2/model", "points/pca-g2", "points", "plots", "sweep.json"])
def test_links_that_leave_the_run_are_refused(tmp_path: Path, link: str, undrawn: None) -> None:
    run = write_run(tmp_path / "run")
    outside = tmp_path / "outside"
    if not (run / link).exists():
        (run / link).mkdir()
    (run / link).rename(outside)
    (run / link).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(UsageError, match="leaves the run folder"):
        write_report(run)
    assert sorted(outside.rglob("*")) == before


def test_files_that_are_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    victims = {}
    for name in ("report.html", "plots/cache.svg", "plots/cache.png"):
        victims[name] = tmp_path / name.replace("/", "-")
        victims[name].write_text("mine")
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).symlink_to(victims[name])
    readme = run / "points" / "pca-g2" / "model" / "README.md"
    victims["README.md"] = tmp_path / "README.md"
    victims["README.md"].write_text(sign_card("mine"))
    readme.symlink_to(victims["README.md"])
    report = write_report(run)
    assert readme in report.kept
    assert [path.read_text()[:4] for path in victims.values()] == ["mine"] * len(victims)


def test_pipes_and_damaged_files_are_not_waited_for(tmp_path: Path, undrawn: None) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    os.mkfifo(run / "loose.json")
    (run / "deep.json").write_text("[" * 200_000)
    (run / "points" / "pca-g2" / "metrics.jsonl").write_bytes(
        b'\xff\n[]\n{"step": 1}\n{"kind": "train", "step": "x"}\n'
    )
    assert write_report(run).page.is_file()
    (run / "sensitivity.json").unlink()
    os.mkfifo(run / "sensitivity.json")
    with pytest.raises(UsageError, match=r"sensitivity\.json: no JSON object"):
        write_report(run)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value anything stands."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("whole"))
    (run / "eval.json").write_text(json.dumps(evaluation(comparison("tiny-gqa2", 2, 0.1)).to_json()))
    (run / "bench.json").write_text(json.dumps(bench("tiny-gqa2", 0.5).to_json()))
    return run


@pytest.mark.parametrize("name", FILES)
def test_any_value_may_be_anything(whole: Path, name: str) -> None:
    file = whole / name
    original = json.loads(file.read_text())
    chosen = random.Random(name)
    spots = list(places(original))
    refused: list[str] = []
    for _ in range(30):
        value = copy.deepcopy(original)
        *above, last = chosen.choice(spots)
        here = value
        for key in above:
            here = here[key]
        here[last] = chosen.choice(HOSTILE)
        file.write_text(json.dumps(value))
        try:
            run = read_run(whole)
            html = page(run, {})
            verdict(run)
            texts = [card(run, point) for point in run.done]
            chosen.choice(list(DRAWINGS.values()))(Figure().add_subplot(), run)
        except GQAConvertError as error:
            refused.append(str(error))
            continue
        Outline(html)
        assert scripts(html) == [SORTING]
        assert html.count("<script") == 1
        html.encode()
        for text in texts:
            text.encode()
    file.write_text(json.dumps(original))
    assert 0 < len(refused) < 30
    assert all("\n" not in line and str(whole) in line for line in refused)


def test_numbers_with_markup_are_refused_with_their_place(tmp_path: Path) -> None:
    for field in ("context", "stride", "windows", "tokens", "bytes"):
        value = evaluation(comparison("tiny-gqa2", 2, 0.1)).to_json() | {field: SCRIPT}
        (tmp_path / "eval.json").write_text(json.dumps(value))
        with pytest.raises(UsageError, match=rf"eval\.json: {field}: "):
            read_run(tmp_path)
    value = evaluation(comparison("tiny-gqa2", 2, 0.1)).to_json()
    value["base"]["kv_heads"] = SCRIPT
    (tmp_path / "eval.json").write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"eval\.json: base\.kv_heads: "):
        read_run(tmp_path)


def test_a_drawing_shows_formulas_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    sweep = json.loads((run / "sweep.json").read_text())
    for point in sweep["points"]:
        point["variant"] = "$\\frac{ <script>"
    (run / "sweep.json").write_text(json.dumps(sweep))
    html = write_report(run).page.read_text()
    Outline(html)
    assert scripts(html) == [SORTING]
    assert html.count("<script") == 1


def test_the_card_is_plain_text(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    model = run / "points" / "pca-g2" / "model"
    source = {"name": "x\n---\nlicense: mit\n# [y](z)", "hub": {"repo_id": "a/b\nlicense: mit"}}
    (model / "gqa_convert.json").write_text(json.dumps({"source": source, "versions": [1], "tool": SCRIPT}))
    loaded = read_run(run)
    text = card(loaded, next(p for p in loaded.points if p.name == "pca-g2"))
    front: Any = ModelCard(text).data
    assert front.license is None
    assert front.base_model is None
    assert front.library_name == "transformers"
    assert "[y](z)" not in text.split("\n---\n")[-1]
