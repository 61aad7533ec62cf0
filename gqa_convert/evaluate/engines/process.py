"""A model in an engine, in a process of its own: start it, ask it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from gqa_convert.errors import UsageError
from gqa_convert.evaluate.engines.known import Engine

LOAD_S = 3600
"""Seconds that converting and loading a model may take."""
ASK_S = 1800
"""Seconds that a question may take: reading 8k tokens for each of many sequences takes minutes on a CPU."""
_SERVE = Path(__file__).with_name("adapters") / "serve.py"
_CHECK = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"


class EngineFailed(Exception):
    """What the engine said, or how its process ended."""


def find_python(engine: Engine, python: str | None) -> str:
    """The Python that has the engine: the one named, or this one.

    Raises:
        UsageError: if it cannot be run or lacks the engine.
    """
    chosen = python or sys.executable
    try:
        checked = subprocess.run([chosen, "-c", _CHECK, *engine.needs], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--engine-python {chosen}: cannot be run ({type(error).__name__}). Name a Python.") from error
    if checked.returncode:
        raise UsageError(f"--engine-python {chosen}: is no Python that runs ({checked.stderr.strip()[-200:]}).")
    missing = checked.stdout.split()
    if missing:
        where = "this Python" if python is None else chosen
        raise UsageError(
            f"--engine {engine.name}: {where} has no {', '.join(missing)}. Name one that has by --engine-python "
            f"({engine.install}; scripts/clients/setup.sh makes environments of all engines)."
        )
    return chosen


class EngineProcess:
    """One model, loaded by an engine. Leave it by `close`, or use it as a context."""

    def __init__(self, engine: Engine, python: str, *, threads: int) -> None:
        variables = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "GGML_NO_BACKTRACE": "1",
        }
        variables.pop("PYTHONPATH", None)  # its packages are another Python's
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (closed with the process)
        self._running = subprocess.Popen(
            [python, str(_SERVE), engine.adapter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=variables,
            start_new_session=True,
        )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, *, limit_s: float = ASK_S, **arguments: Any) -> dict[str, Any]:
        """Ask a question of `adapters/serve.py` and wait for the answer.

        Raises:
            EngineFailed: if the engine refuses, dies or takes too long.
        """
        stdin, stdout = self._running.stdin, self._running.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()
        except OSError as error:
            raise EngineFailed(self._end()) from error
        line, deadline = b"", time.monotonic() + limit_s
        while not line.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.close()
                raise EngineFailed(f"no answer in {limit_s:.0f} s")
            part = os.read(stdout.fileno(), 1 << 16)
            if not part:
                raise EngineFailed(self._end())
            line += part
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(str(answer["error"]))
        return answer

    def _end(self) -> str:
        code = self._running.wait()
        self._errors.seek(0)
        said = " ".join(self._errors.read()[-4000:].decode(errors="replace").split())[-200:]
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended ({how}): {said}" if said else f"its process ended ({how})"

    def close(self) -> None:
        """End the process and what it started."""
        if self._running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
        for stream in (self._running.stdin, self._running.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
