#!/usr/bin/env python3
"""Write docs/commands.md: every command with every option, from the command line itself.

python scripts/commands_table.py            # write it
python scripts/commands_table.py --check    # exit 1 if it is not what the command line says now
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from gqa_convert.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands and options

<!-- written by scripts/commands_table.py -->

`gqa-convert` is `gqa convert`. Every command also has `-h`/`--help`; `gqa --install-completion` sets up completion in
your shell. With `--json`, what is printed is one object with `schema_version`, and so is an error:
`{"schema_version": 1, "error": {"kind", "message", "exit_code"}}`. Exit codes: 0 done, 2 usage (a missing folder too),
3 verification, 4 damaged or unsafe checkpoint, 5 model that cannot convert, 6 output, 7 hub, 8 training that went
wrong, 75 stopped on request and saved, 130 interrupted.
"""


def commands(group: Any = None, prefix: str = "gqa") -> Iterator[tuple[str, Any]]:
    """Every command by its full name, groups of commands opened."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def options(command: Any) -> dict[str, Any]:
    """A command's options by their first long spelling."""
    listed = (each for each in command.params if each.param_type_name == "option")
    return {spelled(each)[0]: each for each in listed if spelled(each)[0] != "--help"}


def spelled(option: Any) -> list[str]:
    """The spellings of an option, long ones first."""
    return sorted([*option.opts, *option.secondary_opts], key=lambda text: (not text.startswith("--"),))


def page() -> str:
    """The whole page."""
    listed = dict(commands())
    owners: dict[str, list[str]] = {}
    for name, command in listed.items():
        for option in options(command):
            owners.setdefault(option, []).append(name.removeprefix("gqa "))
    shared = {option: names for option, names in owners.items() if len(names) > 1}
    lines = [HEAD, "## Options of several commands\n", "| option | " + " | ".join(_short(listed)) + " |"]
    lines.append("|---" * (len(listed) + 1) + "|")
    for option, names in sorted(shared.items()):
        marks = ("x" if name.removeprefix("gqa ") in names else "" for name in listed)
        lines.append(f"| `{option}` | " + " | ".join(marks) + " |")
    for name, command in listed.items():
        lines += [f"\n## {name}\n", _summary(command) + "\n", "| | | default |", "|---|---|---|"]
        for argument in (each for each in command.params if each.param_type_name == "argument"):
            lines.append(f"| {_cell(argument.metavar or argument.name.upper())} | {_cell(argument.help or '')} | |")
        lines += [f"| {_names(o)} | {_cell(o.help or '')} | {_default(o)} |" for o in options(command).values()]
    return "\n".join(lines) + "\n"


def _short(listed: dict[str, Any]) -> list[str]:
    return [name.removeprefix("gqa ") for name in listed]


def _summary(command: Any) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split())


def _names(option: Any) -> str:
    return ", ".join(f"`{text}`" for text in spelled(option))


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    return "" if value is None or value is False or value == "" else f"`{'on' if value is True else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write the page, or compare it."""
    wanted = page()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == wanted else f"{PAGE.name}: run {sys.argv[0]}")
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
