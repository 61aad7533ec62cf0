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

    `gqa uptrain export RUN --out FOLDER` makes a plain model of any checkpoint of a run.
    """
    from gqa_convert.uptrain.read_config import load_config

    changes = [*(overrides or ()), *(["log.profile=true"] if profile else [])]
    settings = load_config(config, changes)
    if dry_run:
        from gqa_convert.console import console, key_value_table
        from gqa_convert.uptrain.plan import plan_rows, resolve

        planned = resolve(settings)
        if json:
            emit(planned.to_json(), True, lambda: None)
        else:
            console().print(key_value_table(plan_rows(planned)))
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
    force: Force = False,
    json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make a plain transformers folder of a checkpoint, whichever engine and however many processes saved it."""
    from gqa_convert.console import console
    from gqa_convert.uptrain.from_checkpoint import export_checkpoint

    folder, found = export_checkpoint(
        run,
        out,
        step=step,
        model=model,
        force=force,
        trust_remote_code=trust_remote_code,
        tell=lambda text: typer.echo(text, err=True),
    )
    if json:
        emit({"folder": str(folder), "step": found}, True, lambda: None)
    else:
        console().print(f"[bold green]wrote[/] {folder} (step {found:,})", highlight=False)


class _RunOrExport(TyperGroup):
    """`gqa uptrain CONFIG` is `gqa uptrain run CONFIG`: what is no command's name is a configuration."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] in (["export"], [_RUN]) else [_RUN, *args])


_RUN = "run"
uptrain_app = typer.Typer(cls=_RunOrExport, context_settings=SETTINGS, help="Uptrain a converted checkpoint.")
register(uptrain_app, _RUN, uptrain_command)
register(uptrain_app, "export", export_command, hub=True)


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
