"""The command line: thin, and free of heavy imports until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gqa_convert.cli import evaluate as evaluate_commands
from gqa_convert.cli import show_conversion
from gqa_convert.cli.budget import budget_command
from gqa_convert.cli.convert import convert_command, plan_command
from gqa_convert.cli.heal import heal_command
from gqa_convert.cli.options import AsJson, ComputeDtype, Device, Groups, Model, Revision, Trust, Version
from gqa_convert.cli.report import report_command
from gqa_convert.cli.running import SETTINGS, emit, register, run_command, with_common
from gqa_convert.cli.uptrain import uptrain_app

app = typer.Typer(
    name="gqa",
    help="Convert multi-head-attention checkpoints to grouped-query attention, and see what that costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def inspect_command(
    model: Model, json: AsJson = False, trust_remote_code: Trust = False, revision: Revision = None
) -> None:
    """Say what a checkpoint is: head layout, legal group counts, cache cost."""
    from gqa_convert.conversion import inspect

    inspection = inspect.inspect(model, trust_remote_code=trust_remote_code, revision=revision)
    emit(inspection.to_json(), json, lambda: show_conversion.show_inspection(inspection))


def verify_command(
    source: Annotated[
        str, typer.Argument(help="The checkpoint that was converted: a folder, a hub id, or `demo`.", metavar="SRC")
    ],
    converted: Annotated[Path, typer.Argument(help="The folder it was converted to.", metavar="DST")],
    logits: Annotated[bool, typer.Option("--logits", help="Also load and run both models.")] = False,
    device: Device = "auto",
    dtype: ComputeDtype = "auto",
    json: AsJson = False,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Check a converted folder against its source: keys, shapes, bytes, merged values, and logits if asked."""
    from gqa_convert.conversion import inspect

    checks = inspect.verify_pair(
        source,
        converted,
        logits=logits,
        trust_remote_code=trust_remote_code,
        revision=revision,
        device=device,
        dtype=dtype,
    )
    emit(checks, json, lambda: show_conversion.show_checks(converted, checks))


def families_command(
    name: Annotated[str | None, typer.Argument(help="Only model types that contain this.")] = None,
    json: AsJson = False,
) -> None:
    """List every model type of the installed transformers: whether it converts, and why not where it does not."""
    from gqa_convert.anatomy import families

    listed = [family for family in families.families() if name is None or name in family.model_type]
    emit({"families": [family.to_json() for family in listed]}, json, lambda: show_conversion.show_families(listed))


def methods_command(json: AsJson = False) -> None:
    """List the merge methods."""
    from gqa_convert.merge.registry import all_methods

    listed = list(all_methods().values())
    described = [{"name": m.name, "title": m.title, "reference": m.reference} for m in listed]
    emit({"methods": described}, json, lambda: show_conversion.show_methods(listed))


def demo_command(
    groups: Groups = 2,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the converted model here, the uptrained one beside it.")
    ] = None,
    uptrain_seconds: Annotated[
        float, typer.Option(min=0, help="About how long to uptrain after converting; 0: not at all.")
    ] = 60.0,
    json: AsJson = False,
) -> None:
    """Convert the small model that comes with the package, uptrain it, and show what was gained and lost."""
    from gqa_convert.demo.run import run_demo

    run_demo(out, groups=groups, uptrain_seconds=uptrain_seconds, json=json)


register(app, "convert", convert_command, hub=True)
register(app, "plan", plan_command, hub=True)
register(app, "inspect", inspect_command, hub=True)
register(app, "verify", verify_command, hub=True)
register(app, "families", families_command)
register(app, "methods", methods_command)
register(app, "demo", demo_command)
register(app, "eval", evaluate_commands.eval_command, hub=True)
register(app, "bench", evaluate_commands.bench_command, hub=True)
register(app, "sweep", evaluate_commands.sweep_command, hub=True)
register(app, "report", report_command, hub=True)
register(app, "budget", budget_command)
register(app, "heal", heal_command, hub=True)
app.add_typer(uptrain_app, name="uptrain")


@app.callback(invoke_without_command=True)
def umbrella(version: Version = False) -> None:
    """Convert multi-head-attention checkpoints to grouped-query attention, and see what that costs."""


def main() -> None:
    """Entry point of `gqa`."""
    run_command(app)


def convert_main() -> None:
    """Entry point of `gqa-convert`: the same command as `gqa convert`."""
    single = typer.Typer(pretty_exceptions_enable=False, context_settings=SETTINGS)
    single.command("gqa-convert", context_settings=SETTINGS)(with_common(convert_command, hub=True))
    run_command(single)
