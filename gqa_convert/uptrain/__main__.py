"""`accelerate launch -m gqa_convert.uptrain CONFIG`: the same command as `gqa uptrain`."""

from __future__ import annotations

import os
import sys

import typer

from gqa_convert.cli.running import run_command
from gqa_convert.cli.uptrain import uptrain_command


def _leave(code: int) -> None:
    """End the process now.

    The libraries under a process group keep threads of their own. One that asks for the interpreter while that is being
    torn down is unwound by force, which C++ answers with abort: 134 in place of the exit code that the launcher waits
    for (0, or 75 for "saved, start me again"). All files are closed and the process group is gone by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(uptrain_command)
    try:
        run_command(app)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
        _leave(code if isinstance(code, int) else int(code is not None))
    _leave(0)
