import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.errors import HubError, UsageError
from gqa_convert.evaluate.metric import Figure
from gqa_convert.evaluate.results import Recall
from gqa_convert.report import writing
from gqa_convert.report.collect import read_run
from gqa_convert.report.drawings import DRAWINGS, TITLES, _stretch
from gqa_convert.report.labels import place_labels
from gqa_convert.report.page import page
from gqa_convert.report.words import verdict
from gqa_convert.report.writing import push, write_report
from gqa_convert.uptrain.metrics import MetricsFile
from tests.report.make_run import HOSTILE, bench, comparison, evaluation, write_run

pytest.importorskip("matplotlib", reason="the report extra is not installed")

DRAWN = [name for name in DRAWINGS if name not in ("heads", "recall")]
"""Of a run that asked nothing, none of whose points has layers that differ (`tests/evaluate/test_sweep.py` has one)."""


class Outline(HTMLParser):
    """Every tag and attribute value of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.values: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


SORTING = (Path(writing.__file__).parent / "templates" / "sort.js").read_text()


def scripts(html: str) -> list[str]:
    """What the page runs: our own sorting, and nothing that came from a run folder."""
    return re.findall(r"<script[^>]*>(.*?)</script", html, re.DOTALL | re.IGNORECASE)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


def test_the_page_needs_nothing_else(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    outline = Outline(text)
    assert not {"link", "img", "iframe", "object"} & set(outline.tags)
    assert scripts(text) == [SORTING]
    inside = ("#", "http://www.w3.org/")
    addresses = re.findall(r"(?:href|src)=\"([^\"]*)\"|url\(([^)]*)\)|@import\s+(\S+)", text)
    assert all(any(a) and next(x for x in a if x).startswith(inside) for a in addresses)
    assert len(set(outline.ids)) == len(outline.ids), "ids of different plots must not clash"
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    assert outline.tags.count("svg") == len(DRAWN)


def test_what_came_from_outside_is_escaped(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    assert HOSTILE not in text
    assert "&lt;script&gt;alert" in text


def test_samples_stand_side_by_side_the_best_first(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    said = text[text.index("What they write") :]
    places = [said.index(words) for words in ("tiny goes on", "pca-g2 goes on", "mean-g4 goes on", "mean-g2 goes on")]
    assert places == sorted(places)
    assert said.count("<blockquote>") == 2
    assert said.count("tiny goes on") == 2, "the original's text is shown once for each beginning"
    assert "&lt;b&gt;once&lt;/b&gt;" in said


def test_it_says_where_the_chosen_conversion_differs(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    for words in ("Where it differs", "Where pca-g2 differs", "behind 16 to 31 tokens", TITLES["kinds"]):
        assert words in text
    assert "Where mean-g4 differs" not in text


@pytest.mark.parametrize(
    ("by", "name", "ends"),
    [
        ("position", "16-31", (16, 31)),
        ("kind", "16-31", None),
        ("position", "0-3", None),
        ("position", "²-31", None),
        ("position", "1-" + "9" * 5000, None),
        ("position", "far", None),
    ],
)
def test_a_stretch_of_the_window_is_two_numbers(by: str, name: str, ends: tuple[int, int] | None) -> None:
    part = comparison("tiny-gqa2", 2, 0.1).parts[0]
    assert _stretch(replace(part, by=by, name=name)) == ends


def test_every_plot_is_a_file_too(run_folder: Path) -> None:
    for name in DRAWN:
        assert (run_folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(run_folder / "plots" / f"{name}.svg").getroot().tag.endswith("svg")
    assert set(TITLES) == set(DRAWINGS)


def test_a_report_is_the_same_every_time(run_folder: Path) -> None:
    before = {path: path.read_bytes() for path in [run_folder / "report.html", *(run_folder / "plots").iterdir()]}
    write_report(run_folder)
    assert {path: path.read_bytes() for path in before} == before


def test_the_verdict_names_gain_and_cost(run_folder: Path) -> None:
    said = verdict(read_run(run_folder))
    assert said == (
        "Take 2 KV heads by pca: the KV cache shrinks to 25%, decoding takes 0.50 of the time, and the loss rises by "
        "0.0300 nats per token (95 % interval 0.0200 to 0.0400), within the tolerance of 0.05."
    )
    assert said in (run_folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("rises", "scale"),
    [
        ([0.1, 0.2, 0.3], "linear"),
        ([0.01, 0.02, 1.9], "log"),
        ([-0.002, 0.01, 1.9], "symlog"),
        ([-0.1, -0.2], "linear"),
    ],
)
def test_what_the_mean_dwarfs_is_still_seen(rises: list[float], scale: str) -> None:
    from matplotlib.figure import Figure

    from gqa_convert.report.drawings import _dwarfed

    axes = Figure().add_subplot()
    axes.plot(rises)
    _dwarfed(axes, rises)
    assert axes.get_yscale() == scale


def test_nothing_within_the_tolerance_is_said(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, tolerance=0.001))
    assert verdict(run).startswith("No point stays within 0.001 nats per token; the nearest is mean-g4 at +0.0200.")
    assert run.chosen is not None
    assert run.chosen.name == "mean-g4"


def test_the_card_has_metadata_numbers_and_how_to_load(run_folder: Path) -> None:
    text = (run_folder / "points" / "pca-g2" / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "someone/tiny"
    assert {"gqa", "gqa-convert"} <= set(front["tags"])
    assert "license" not in front
    for part in ("| KV heads | 8 | 2 |", "4.0300", "AutoModelForCausalLM", "method pca", "25.0% of the original"):
        assert part in text
    assert "fold False" not in text


def carry_over(file: Path, text: str) -> None:
    """Write a README.md as a conversion carries it over: with its hash in the record."""
    file.write_text(text)
    record = json.loads((file.parent / "gqa_convert.json").read_text())
    record["files"] = {file.name: {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}}
    (file.parent / "gqa_convert.json").write_text(json.dumps(record))


def test_a_card_somebody_wrote_is_kept_and_a_licence_carried_over(tmp_path: Path) -> None:
    write_run(tmp_path)
    theirs = tmp_path / "points" / "mean-g4" / "model" / "README.md"
    theirs.write_text("# My GQA model\n")
    original = tmp_path / "points" / "pca-g2" / "model" / "README.md"
    carry_over(original, "---\nlicense: apache-2.0\n---\n# The original\n")
    changed = tmp_path / "points" / "mean-g2" / "model" / "README.md"
    carry_over(changed, "# The original\n")
    changed.write_text("# The original, and what I found out about it\n")
    report = write_report(tmp_path, base_model="me/mine")
    assert theirs.read_text() == "# My GQA model\n"
    assert set(report.kept) == {theirs, changed}
    assert report.cards == (original,)
    front = yaml.safe_load(original.read_text().split("---")[1])
    assert (front["license"], front["base_model"]) == ("apache-2.0", "me/mine")


def test_single_measurements_make_a_report(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(evaluation(comparison("tiny-gqa2", 2, 0.1)).to_json()))
    (tmp_path / "bench.json").write_text(json.dumps(bench("tiny-gqa2", 0.5).to_json()))
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    Outline(text)
    assert "tiny-gqa2: the KV cache shrinks to 25%" in text
    assert "left out: does not fit" in text


def test_plots_of_several_texts_name_the_text_and_recall_is_drawn_against_length(tmp_path: Path) -> None:
    asked = tuple(
        Recall(model=name, kind=kind, context=context, right=right)
        for name, right in (("tiny", (True, True)), ("two", (True, False)), ("unasked", ()))
        for kind in ("needle", "keys")
        for context in (256, 512)
    )
    prose = replace(evaluation(comparison("two", 2, 0.1)), recall=asked)
    code = replace(evaluation(comparison("two", 2, 0.2)), data="code.jsonl")
    for name, measured in (("a", prose), ("b", code)):
        (tmp_path / f"{name}.json").write_text(json.dumps(measured.to_json()))
    run = read_run(tmp_path)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for name, labels in (
        ("kinds", ["two, poems.jsonl", "two, code.jsonl"]),
        ("positions", ["two, poems.jsonl", "two, code.jsonl"]),
        ("recall", ["tiny", "two"]),
    ):
        figure, axes = pyplot.subplots()
        assert DRAWINGS[name](axes, run)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
        if name == "recall":
            assert [list(line.get_ydata()) for line in axes.get_lines()] == [[1.0, 1.0], [0.5, 0.5]]
        pyplot.close(figure)


@pytest.mark.parametrize(("rise", "better"), [(0.01, False), (0.3, True)])
def test_the_verdict_says_where_a_quantised_cache_is_the_better_deal(tmp_path: Path, rise: float, better: bool) -> None:
    stored = comparison("tiny", 8, 0.02)
    stored = replace(
        stored,
        model=replace(stored.model, cache="int4"),
        figures=stored.figures | {"cache_ratio": Figure(0.1)},  # of a cache in float32
    )
    both = replace(stored, model=replace(stored.model, name="two"))
    measured = replace(evaluation(comparison("two", 2, rise)), quantised=(stored, both))
    (tmp_path / "eval.json").write_text(json.dumps(measured.to_json()))
    (tmp_path / "bench.json").write_text(json.dumps(bench("two", 0.5).to_json()))
    assert ("quantise the original's and do not convert" in verdict(read_run(tmp_path))) is better
    assert ("than two (int4)." in verdict(read_run(tmp_path))) is better


def test_losses_on_several_texts_are_said_of_each_model_with_the_text(tmp_path: Path) -> None:
    prose = evaluation(comparison("two", 2, 0.1), comparison("one", 1, 0.3))
    code = replace(prose, data="code.jsonl", converted=(comparison("two", 2, 0.2), comparison("one", 1, 0.4)))
    for name, measured in (("a", prose), ("b", code)):
        (tmp_path / f"{name}.json").write_text(json.dumps(measured.to_json()))
    first, second = re.split(r"(?<=\.) (?=one)", verdict(read_run(tmp_path)))
    for said, name, rises in ((first, "two", ("+0.1000", "+0.2000")), (second, "one", ("+0.3000", "+0.4000"))):
        assert said.startswith(f"{name}: the KV cache shrinks to ")
        assert re.findall(r"(\S+) nats per token \(.*?\) on (\S+?)[ .]j", said) == [
            (rises[0], "poems"),
            (rises[1], "code"),
        ]


def test_lm_eval_results_are_shown(tmp_path: Path) -> None:
    results = evaluation(comparison("tiny-gqa2", 2, 0.1)).to_json()
    results["tasks"] = {"tiny": {"boolq": {"acc": 0.5}}, "tiny-gqa2": {"boolq": {"acc": 0.25}}}
    (tmp_path / "eval.json").write_text(json.dumps(results))
    run = read_run(tmp_path)
    assert '<th scope="row">boolq, acc</th><td>0.5</td><td>0.25</td>' in page(run, {})


def test_a_run_written_before_metrics_were_rows_still_makes_a_report(tmp_path: Path) -> None:
    files = json.loads(Path(__file__).with_name("first_format.json").read_text())
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    report = write_report(tmp_path)
    assert report.verdict == (
        "Take 2 KV heads by pca: the KV cache shrinks to 25%, decoding takes 0.50 of the time, and the loss rises by "
        "0.0300 nats per token (95 % interval 0.0200 to 0.0400), within the tolerance of 0.05."
    )
    text = report.page.read_text()
    for cell in ("4.0300", "+0.0300 [+0.0200, +0.0400]", "90.0%", "512 B", "x 0.25", "x 0.50 (faster)", "60.34"):
        assert f"<td>{cell}</td>" in text
    drawn = {path.stem for path in report.plots}
    assert drawn == {*DRAWN} - {"kinds", "positions"}, "tokens were not told apart then"
    assert len(report.cards) == 3


def test_headline_and_table_agree_where_decoding_is_no_faster(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    sweep = json.loads((run / "sweep.json").read_text())
    for point in sweep["points"]:
        point |= {"time_ratio": 0.96, "time_ratio_verdict": "no difference"}
    (run / "sweep.json").write_text(json.dumps(sweep))
    loaded = read_run(run)
    assert "though decoding is no faster here" in verdict(loaded)
    assert "<td>x 0.96 (no difference)</td>" in page(loaded, {})


def test_commands_date_and_versions_are_on_the_page(run_folder: Path, tmp_path: Path) -> None:
    text = (run_folder / "report.html").read_text()
    assert (
        "gqa sweep tiny --groups 4,2 --methods=mean,pca,first --data=poems.jsonl --context 128 --stride 64 "
        "--max-windows 0 --dtype=float32 --tolerance 0.05 --batch 8,64 "
        f"--cache-context 2048,8192 --out {run_folder.name}" in text
    )
    value = evaluation(comparison("tiny gqa2", 2, 0.1)).to_json() | {"date": "2026-01-31"}
    (tmp_path / "eval.json").write_text(json.dumps(value))
    text = page(read_run(tmp_path), {})
    assert "gqa eval tiny &#39;tiny gqa2&#39; --data=poems.jsonl" in text
    assert "measured on 2026-01-31" in text
    assert "torch 2.13.0" in text


def test_tables_and_drawings_can_be_read_aloud(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    assert text.count("<table>") == text.count('<thead><tr><th scope="col"') == 3
    assert re.findall(r"<tr[^>]*><t[dh](?! scope)", text) == [], "the first cell of every row names it"
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert [label.split(".")[0] for label in labels] == [TITLES[name] for name in DRAWN]
    assert all('role="region"' in box and "tabindex" in box for box in re.findall(r'<div class="scroll"[^>]*>', text))


def test_the_log_of_an_uptraining_makes_a_curve(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    log.write("evaluation", 0, {"held_out_loss": 5.0, "held_out_tokens": 64.0, "reference_loss": 3.5})
    for step in (1, 2):
        log.write("train", step, {"tokens": step * 100, "loss": 5 - step / 10})
    log.write("evaluation", 2, {"held_out_loss": 4.5, "held_out_tokens": 64.0})
    run = read_run(tmp_path)
    (curve,) = run.curves
    assert "nothing was compared yet" in page(run, {})
    assert (curve.name, curve.unit, curve.reference) == ("run", "tokens", 3.5)
    assert curve.train == ((100, 4.9), (200, 4.8))
    assert curve.held_out == ((0, 5.0), (200, 4.5))


def test_labels_do_not_overprint() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.add_subplot()
    points = [(0.5 + 0.004 * (i % 3), 0.1 + 0.002 * i, "16") for i in range(9)]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 2)
    place_labels(axes, points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) == len(points)
    assert [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)] == []


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        write_report(tmp_path / "none")


def test_pushing_uploads_the_recommended_model(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    class Api:
        def create_repo(self, repo: str, **rest: object) -> None:
            calls.append((repo, rest["private"]))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            calls.append((repo_id, folder_path.parent.name))
            return "https://hub/x"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push(run_folder, "me/x") == "https://hub/x"
    assert push(run_folder, "me/y", point="mean-g4", private=False)
    assert calls == [("me/x", True), ("me/x", "pca-g2"), ("me/y", False), ("me/y", "mean-g4")]
    with pytest.raises(UsageError, match="name one with --point"):
        push(run_folder, "me/z", point="mean-g9")
    monkeypatch.setattr(Api, "create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(HubError, match="no network"):
        push(run_folder, "me/x")


def test_without_matplotlib_it_says_what_to_install(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"gqa-convert\[report\]"):
        writing.write_report(run_folder)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder = write_run(tmp_path)
    monkeypatch.setattr(writing, "draw_all", lambda run, folder: dict.fromkeys(DRAWN, "<svg></svg>"))
    shown = CliRunner().invoke(app, ["report", str(run_folder)])
    assert shown.exit_code == 0, shown.output
    assert "Take 2 KV heads by pca" in shown.output
    printed = json.loads(CliRunner().invoke(app, ["report", str(run_folder), "--json", "--no-cards"]).stdout)
    assert printed["cards"] == []
    assert len(printed["plots"]) == 2 * len(DRAWN)
