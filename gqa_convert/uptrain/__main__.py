"""`accelerate launch -m gqa_convert.uptrain CONFIG`: the same command as `gqa uptrain`."""

from __future__ import annotations

import typer

from gqa_convert.cli import _run
from gqa_convert.uptrain.command import uptrain_command

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(uptrain_command)
    _run(app)
