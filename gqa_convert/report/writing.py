"""Write a report: the page, the plots, the model cards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.hub import upload_model
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.files import write_text
from gqa_convert.outcome import Outcome
from gqa_convert.report.card import card, may_write
from gqa_convert.report.collect import Run, inside, read_run
from gqa_convert.report.page import page
from gqa_convert.report.plots import draw_all
from gqa_convert.report.words import verdict


@dataclass(frozen=True, kw_only=True)
class Report(Outcome):
    """What was written, model cards that somebody else wrote and that were kept, and the verdict."""

    page: Path
    plots: tuple[Path, ...]
    cards: tuple[Path, ...]
    kept: tuple[Path, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "page": str(self.page),
            "plots": [str(path) for path in self.plots],
            "cards": [str(path) for path in self.cards],
            "cards_kept": [str(path) for path in self.kept],
            "verdict": self.verdict,
        }


def write_report(folder: Path, *, cards: bool = True, base_model: str = "") -> Report:
    """Write `report.html` and `plots/` into a run folder, and a README.md into every converted folder in it.

    A README.md that is neither ours nor carried over from the original, unchanged, is left alone.

    Args:
        folder: the run folder.
        cards: write model cards.
        base_model: hub id of the original, for the cards' metadata.

    Raises:
        UsageError: if there is nothing to report, or matplotlib is missing.
        OutputError: if something cannot be written.
    """
    run = read_run(folder)
    plots = draw_all(run, inside(folder, folder / "plots"))
    write_text(folder / "report.html", page(run, plots))
    written, kept = [], []
    for point in run.done if cards else ():
        model = run.model_folder(point)
        if not model.is_dir():
            continue
        file = model / "README.md"
        if not may_write(model):
            kept.append(file)
            continue
        write_text(file, card(run, point, base_model=base_model))
        written.append(file)
    return Report(
        page=folder / "report.html",
        plots=tuple(folder / "plots" / f"{name}.{kind}" for name in plots for kind in ("svg", "png")),
        cards=tuple(written),
        kept=tuple(kept),
        verdict=verdict(run),
    )


def push(folder: Path, repo: str, *, point: str = "", private: bool = True) -> str:
    """Upload a point's converted folder, card included, to the hub; returns its address.

    Args:
        folder: the run folder.
        repo: `owner/name`, made if missing.
        point: which point; the recommended one by default.
        private: of a repository that is made.

    Raises:
        UsageError: if the point has no converted folder.
        HubError: if the hub refuses.
    """
    run = read_run(folder)
    chosen = next((p for p in run.done if p.name == point), None) if point else run.recommended
    if chosen is None:
        named = ", ".join(p.name for p in run.done) or "none"
        raise UsageError(f"--push-to-hub: {point or 'no point is recommended'}; name one with --point ({named}).")
    return _upload(run, run.model_folder(chosen), repo, private)


def _upload(run: Run, model: Path, repo: str, private: bool) -> str:
    if not model.is_dir():
        raise UsageError(f"--push-to-hub: {model} was not kept. Sweep again with --keep-models.")
    return upload_model(model, repo, private=private, message="Converted by gqa-convert")
