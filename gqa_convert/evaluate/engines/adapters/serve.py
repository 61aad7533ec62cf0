"""Answer questions of the benchmark about a model in an engine, a line of JSON each. Run by path: `serve.py ADAPTER`.

An adapter is a file beside this one with `version() -> str`, `CACHE` (where the bytes of the cache come from) and a
class `Model(folder, work, dtype, threads, batch, tokens)`, whose `batch` and `tokens` are the most that will be asked
for, with

    facts                            dtype, cache_dtype, weight_bytes
    prefill(batch, context)          seconds to read fresh prompts and give the next token of each
    fill(batch, context, room)       keep so many tokens of so many sequences
    cache_bytes()                    of what is kept
    steps(count)                     seconds to decode so many tokens for each of them; then as before
    drop()                           keep nothing

Nothing of the package is imported: an engine's Python need not have it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

LONGEST_ERROR = 300
FULL_ERROR = 4000


def adapter(name: str) -> Any:
    """Load the adapter of that name; the engine is imported with it."""
    spec = importlib.util.spec_from_file_location(f"adapter_{name}", Path(__file__).with_name(f"for_{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(engine: Any, model: Any, question: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model from here on, and what to say."""
    arguments = {name: value for name, value in question.items() if name != "do"}
    if question["do"] == "load":
        model = engine.Model(**arguments)
        return model, {"version": engine.version(), "cache": engine.CACHE, **model.facts}
    value = getattr(model, question["do"])(**arguments)
    return model, {"value": value}


def main() -> None:
    """Answer until nothing more is asked."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what an engine prints goes elsewhere
    os.dup2(2, 1)
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    engine, model = None, None
    for line in sys.stdin:
        try:
            engine = engine or adapter(sys.argv[1])
            model, reply = answer(engine, model, json.loads(line))
        except BaseException as error:
            words = " ".join(str(error).split())
            sys.stderr.write(f"{type(error).__name__}: {words[:FULL_ERROR]}\n")
            reply = {"error": f"{type(error).__name__}: {words[:LONGEST_ERROR]}"}
        said.write(json.dumps(reply) + "\n")
        said.flush()


if __name__ == "__main__":
    main()
