#!/usr/bin/env python3
"""Run a notebook's cells one after the other in this process, and keep what they print and give.

    python scripts/run_notebook.py docs/quickstart.ipynb

No kernel is needed: the cells are plain Python. A cell's last expression is shown as its text.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(path: Path) -> dict[str, Any]:
    """Execute every code cell in one namespace; returns the notebook with its outputs.

    Raises:
        Exception: what a cell raises.
    """
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = run_cell("".join(cell["source"]), names)
        cell["execution_count"], cell["outputs"] = number, []
        if printed.getvalue():
            text = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": text})
        if value is not None:
            data = {"text/plain": repr(value).splitlines(keepends=True)}
            shown = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
            cell["outputs"].append(shown)
    return notebook


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell; returns the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if isinstance(last, ast.Expr) else None


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(json.dumps(run(path), indent=1) + "\n", encoding="utf-8")
