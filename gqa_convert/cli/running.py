"""How every command runs: what all of them take, and how errors come out, for people and for machines."""

from __future__ import annotations

import inspect
import io
import json as jsonlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gqa_convert.console import speak, talking
from gqa_convert.errors import GQAConvertError, UsageError

SCHEMA_VERSION = 1
"""Of everything that `--json` prints: raised when a key changes its meaning or goes."""

SETTINGS = {"help_option_names": ["-h", "--help"]}
"""Of every command."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only: no progress, no notes.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also what the libraries say, and the whole trace of an error.")
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Token for the Hugging Face hub. (default: HF_TOKEN, or that of `hf auth login`)", metavar="TOKEN"
    ),
]

_INTERRUPTED = 130
_CLICK_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def register(app: typer.Typer, name: str, command: Callable[..., Any], *, hub: bool = False) -> None:
    """Add a command with the options that every command has; with `hub`, those of one that takes hub ids."""
    app.command(name, context_settings=SETTINGS)(with_common(command, hub=hub))


def with_common(command: Callable[..., Any], *, hub: bool) -> Callable[..., Any]:
    """The command with `--quiet`, `--verbose` and, with `hub`, `--token`, which it need not know of."""
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    own = [each.replace(annotation=hints[each.name]) for each in signature.parameters.values()]
    added: dict[str, tuple[Any, Any]] = {"quiet": (Quiet, False), "verbose": (Verbose, False)}
    if hub:
        added["token"] = (Token, None)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]

    @wraps(command)
    def run(**given: Any) -> Any:
        speak(quiet=given.pop("quiet"), verbose=given.pop("verbose"))
        token = given.pop("token", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token  # where huggingface_hub looks, in processes that are started too
        return command(**given)

    run.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*own, *more)}
    return run


def emit(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result: as JSON with the version of its schema, or as `show` does."""
    if as_json:
        typer.echo(jsonlib.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=2))
    else:
        show()


def run_command(app: typer.Typer) -> None:
    """Run the command that the arguments name, and exit.

    An error becomes one line on standard error and its kind's exit code; with `--json`, standard output gets it as an
    object besides: `{"schema_version": 1, "error": {"kind", "message", "exit_code"}}`.
    """
    _print_anything()
    speak(quiet=False, verbose=False)
    try:
        _check_working_directory()
        code = app(standalone_mode=False, prog_name=_called())
    except GQAConvertError as error:
        if talking().verbose:
            traceback.print_exc()
        code = _fail(type(error).__name__, " ".join(str(error).split()), error.exit_code)
    except _CLICK_ERROR as error:
        code = _usage_error(error)
    except typer.Abort:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        typer.echo("interrupted.", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _called() -> str:
    """The command's name as the user knows it, however Python was started."""
    name = Path(sys.argv[0]).name
    return name if name in ("gqa", "gqa-convert") else "gqa"


def _usage_error(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        return UsageError.exit_code
    context = getattr(error, "ctx", None)
    advice = f" See {context.command_path} --help." if context is not None else ""
    message = " ".join(error.format_message().split())
    return _fail("UsageError", message + ("" if message.endswith((".", "?")) else ".") + advice, UsageError.exit_code)


def _fail(kind: str, message: str, code: int) -> int:
    typer.echo(f"error: {message}", err=True)
    if "--json" in sys.argv[1:]:
        described = {"kind": kind, "message": message, "exit_code": code}
        typer.echo(jsonlib.dumps({"schema_version": SCHEMA_VERSION, "error": described}, indent=2))
    return code


def _print_anything() -> None:
    """Let names that are no text (bytes that are not UTF-8) be printed, escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the working directory no longer exists. Change to one that does.") from error
