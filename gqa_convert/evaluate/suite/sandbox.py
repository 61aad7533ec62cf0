"""Whether code passes its tests, run in a child that `confined.py` confines."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

LIMIT_S = 15
"""Seconds by the clock; of processor time it may use fewer, see `confined.py`."""
_CONFINED = Path(__file__).with_name("confined.py")


def passes(code: str, tests: str, *, limit_s: float = LIMIT_S) -> bool:
    """Whether the tests run to their end behind the code, in an empty folder of their own."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="gqa-code-") as folder, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CONFINED)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            child.communicate(json.dumps({"code": code, "tests": tests, "word": word}).encode(), timeout=limit_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said.seek(0)
        return word.encode() in said.read()


@cache
def can_confine() -> bool:
    """Whether this system can confine code: an empty program passes, and one that opens a socket does not."""
    opens = "import socket\ntry:\n    socket.socket()\nexcept PermissionError:\n    pass\nelse:\n    raise SystemExit"
    return passes("", "") and passes(opens, "")
