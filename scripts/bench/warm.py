"""Work in forks of one process that has everything imported: what takes seconds to start takes milliseconds there."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_HEADROOM = 6 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a fork.

    Attributes:
        value: what the work returned; None if it did not get so far.
        fault: `hang`, or how the process died; None if it returned.
        seconds: of wall time.
        cpu_seconds: of processor time.
        peak_mb: the largest memory that was held, what was there before the fork included.
    """

    value: Any
    fault: str | None
    seconds: float
    cpu_seconds: float
    peak_mb: int


def _renew_threads() -> None:
    """Let torch make its thread pool anew, which a fork has not got.

    It does so at the first call, but several threads at once, as transformers loads with, race for it.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(torch.get_num_threads())


def in_fork(work: Callable[[], Any], *, seconds: float) -> Outcome:
    """Run `work` in a fork and return what it returns; a fork that is not done after `seconds` is killed."""
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.setsid()
            held = _virtual_bytes()
            _renew_threads()
            # Whoever asks for more than that is refused by the system, and this machine stays usable.
            resource.setrlimit(resource.RLIMIT_AS, (held + _HEADROOM, held + _HEADROOM))
            answer = pickle.dumps(work())
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        except BaseException as error:
            sys.stderr.write(f"in a fork: {type(error).__name__}: {error}\n")
        finally:
            os._exit(0)
    os.close(writer)
    received = b""
    late = False
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            left = started + seconds - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                late = True
                break
            part = pipe.read(1 << 20)
            if not part:
                break
            received += part
    if late:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    fault = "hang" if late else None if received else f"the process ended with {code}"
    value = None
    if received and not late:
        try:
            value = pickle.loads(received)  # what our own fork wrote
        except (EOFError, pickle.UnpicklingError):  # and it died while it wrote
            fault = f"the process ended with {code}"
    return Outcome(
        value=value,
        fault=fault,
        seconds=time.monotonic() - started,
        cpu_seconds=used.ru_utime + used.ru_stime,
        peak_mb=used.ru_maxrss // 1024,
    )


def import_all(names: list[str]) -> None:
    """Import modules, passing over what cannot be imported by itself."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _virtual_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def start(work: Callable[[], Any]) -> int:
    """Begin `work` in a fork; returns its process id. It ends with 0, or with 1 and a word on what was raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"in a fork: {type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    return child


def kill_after(child: int, seconds: float | None) -> int:
    """Wait for a fork, and kill it with SIGKILL if it is not done after `seconds`; returns its exit status."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
