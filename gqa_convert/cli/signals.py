"""SIGTERM and SIGHUP stop a conversion as Ctrl-C does: what was written is removed, and one line says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gqa_convert.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Preempted` when a signal asks to stop (in the main thread; elsewhere none ever does).

    A second signal changes nothing: removing what was written is short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        name = signal.Signals(number).name
        raise Preempted(f"stopped by {name}: nothing was left at --out. Run the same command again.")

    # A signal that is ignored already stays so: `nohup` asks for it.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    mine = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number] or signal.SIG_DFL)
