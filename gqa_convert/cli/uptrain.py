"""`gqa uptrain`: run, resume or just plan an uptraining."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gqa_convert.cli.options import AsJson, DryRun, Force, Trust
from gqa_convert.cli.running import SETTINGS, emit, register

if TYPE_CHECKING:
    from gqa_convert.uptrain.loop import UptrainResult


def uptrain_command(
    config: Annotated[Path, typer.Argument(help="A run's YAML; configs/ has documented ones.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: section.key=value. Can be repeated.")
    ] = None,
    dry_run: DryRun = False,
    profile: Annotated[bool, typer.Option("--profile", help="Trace a few early steps into OUTPUT/profile.")] = False,
    json: AsJson = False,
) -> None:
    """Uptrain a converted checkpoint as CONFIG says; run it again to go on where it was stopped.

    SIGTERM or SIGUSR1 saves and exits with code 75 at the next step.

    `gqa uptrain export RUN --out FOLDER` makes a plain model of any checkpoint of a run; `gqa uptrain show-data CONFIG`
    shows what the model reads and which tokens it learns.
    """
    from gqa_convert.uptrain.read_config import load_config

    changes = [*(overrides or ()), *(["log.profile=true"] if profile else [])]
    settings = load_config(config, changes)
    if dry_run:
        from gqa_convert.console import console, key_value_table
        from gqa_convert.uptrain.plan import plan_rows, resolve
        from gqa_convert.uptrain.show_data import data_rows

        planned = resolve(settings)
        more = data_rows(settings)
        if json:
            emit(planned.to_json() | {"learns": dict(more)}, True, lambda: None)
        else:
            console().print(key_value_table([*plan_rows(planned), *more]))
        return
    from gqa_convert.uptrain.loop import uptrain

    _show(uptrain(settings, quiet=json), json)


def export_command(
    run: Annotated[Path, typer.Argument(help="The output of a run, or one of its checkpoints.", metavar="RUN")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint. (default: the newest whole one)")] = None,
    model: Annotated[
        str | None, typer.Option(help="The converted model that the run started from, if it was moved.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="trained, averaged (averaging.decay), or final: what the run would end with.")
    ] = "final",
    force: Force = False,
    json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make a plain transformers folder of a checkpoint, whichever engine and however many processes saved it."""
    from gqa_convert.console import console, show_written
    from gqa_convert.uptrain.from_checkpoint import export_checkpoint

    folder, saved_step = export_checkpoint(
        run,
        out,
        step=step,
        model=model,
        weights=weights,
        force=force,
        trust_remote_code=trust_remote_code,
        tell=lambda text: typer.echo(text, err=True),
    )
    if json:
        emit({"folder": str(folder), "step": saved_step}, True, lambda: None)
    else:
        show_written(console(), f"{folder} (step {saved_step:,})")


def show_data_command(
    config: Annotated[Path, typer.Argument(help="A run's YAML.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: section.key=value. Can be repeated.")
    ] = None,
    row: Annotated[int, typer.Option(help="Which document of each source, from 0.", min=0)] = 0,
    json: AsJson = False,
) -> None:
    """Show a document of each source as the model gets it: its tokens, and which of them are learnt."""
    from dataclasses import asdict

    from gqa_convert.console import console
    from gqa_convert.uptrain.read_config import load_config
    from gqa_convert.uptrain.show_data import show_documents

    shown = show_documents(load_config(config, overrides or ()), row=row)
    if json:
        emit({"documents": [asdict(document) for document in shown]}, True, lambda: None)
        return
    from rich.text import Text

    out = console()
    for document in shown:
        how = f", told by {document.way}" if document.way else ""
        out.print(
            f"{document.source}, {document.kind} {document.row}: {sum(document.learnt)} of {len(document.ids)} tokens "
            f"are learnt (in brackets){how}",
            highlight=False,
        )
        text = Text()
        for learnt, tokens in document.stretches:
            text.append("|".join(tokens) if not learnt else f"[{'|'.join(tokens)}]", style="bold green" * learnt)
        out.print(text)


def cache_teacher_command(
    config: Annotated[Path, typer.Argument(help="A run's YAML, with objective.distillation.", metavar="CONFIG")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or to go on with.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: section.key=value. Can be repeated.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Tokens kept of each prediction.", min=1)] = 64,
    json: AsJson = False,
) -> None:
    """Write down once what the teacher says about every token the run will train on: its likeliest tokens.

    Then set objective.distillation.cache, and train where the teacher would not fit. Stopped, the same command goes on;
    under torchrun the processes share the work.
    """
    from gqa_convert.console import console, size
    from gqa_convert.uptrain.read_config import load_config
    from gqa_convert.uptrain.stopping import stop_on_signals
    from gqa_convert.uptrain.teacher_cache import cache_teacher

    with stop_on_signals() as stop:
        blocks, each = cache_teacher(
            load_config(config, overrides or ()),
            out,
            top_k=top_k,
            tell=lambda text: typer.echo(text, err=True),
            stopped=lambda: bool(stop),
        )
    if json:
        emit({"folder": str(out), "blocks": blocks, "bytes": blocks * each}, True, lambda: None)
    else:
        console().print(
            f"[bold green]wrote[/] {blocks:,} blocks, {size(blocks * each)}; train with "
            f"--set objective.distillation.cache={out}",
            highlight=False,
        )


class _RunOrOther(TyperGroup):
    """`gqa uptrain CONFIG` is `gqa uptrain run CONFIG`: what is no command's name is a configuration."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] and args[0] in self.commands else [_RUN, *args])


_RUN = "run"
uptrain_app = typer.Typer(cls=_RunOrOther, context_settings=SETTINGS, help="Uptrain a converted checkpoint.")
register(uptrain_app, _RUN, uptrain_command)
register(uptrain_app, "export", export_command, hub=True)
register(uptrain_app, "cache-teacher", cache_teacher_command)
register(uptrain_app, "show-data", show_data_command)


def _show(result: UptrainResult, json: bool) -> None:
    import os

    from gqa_convert.console import console, show_written

    if os.environ.get("RANK", "0") != "0":
        return
    if json:
        emit({**result.__dict__, "folder": str(result.folder)}, True, lambda: None)
        return
    original = "" if result.reference_loss is None else f"; the original's is {result.reference_loss:.4f}"
    out = console()
    out.print(
        f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f} nats per token{original} "
        f"({result.tokens:,} tokens, {result.seconds:,.0f} s in steps)",
        highlight=False,
    )
    show_written(out, result.folder)
