"""`gqa report`: thin, and free of heavy imports until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gqa_convert.cli.options import AsJson
from gqa_convert.cli.running import emit


def report_command(
    run: Annotated[Path, typer.Argument(help="Run folder of `gqa sweep`, or one with JSON of eval and bench.")],
    cards: Annotated[
        bool, typer.Option("--cards/--no-cards", help="Write a README.md into every converted folder.")
    ] = True,
    base_model: Annotated[str, typer.Option(help="Hub id of the original, for the cards.")] = "",
    push_to_hub: Annotated[str, typer.Option(help="Upload the recommended model to this repository.")] = "",
    point: Annotated[str, typer.Option(help="Upload this point instead.")] = "",
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    json: AsJson = False,
) -> None:
    """Write one page with the verdict, tables and plots of a run, and the model cards."""
    from gqa_convert.console import console, show_written
    from gqa_convert.report.writing import push, write_report

    report = write_report(run, cards=cards, base_model=base_model)
    address = push(run, push_to_hub, point=point, private=not public) if push_to_hub else ""
    if json:
        emit(report.to_json() | {"hub": address}, True, lambda: None)
        return
    out = console()
    out.print(report.verdict, highlight=False)
    show_written(out, f"{report.page}, {len(report.plots)} plots, {len(report.cards)} model cards")
    for path in report.kept:
        out.print(f"kept {path}, which somebody else wrote; remove it to have ours", highlight=False)
    if address:
        out.print(f"uploaded to {address}", highlight=False)
