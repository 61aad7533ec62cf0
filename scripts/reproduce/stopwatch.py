"""Seconds of work: on a CPU the processor's, which do not count what else the machine does; on a GPU the clock's."""

from __future__ import annotations

import time


class Stopwatch:
    """Runs from when it is made.

    Args:
        device: `cpu`, or anything else for the clock's seconds.
    """

    def __init__(self, device: str) -> None:
        self._processor = device == "cpu"
        self._clock, self._work = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Since the start; the processor's are divided by the number of threads that compute."""
        if not self._processor:
            return time.perf_counter() - self._clock
        import torch

        return (time.process_time() - self._work) / torch.get_num_threads()

    @property
    def share(self) -> float:
        """Seconds of work in a second of the clock."""
        return self.seconds / (time.perf_counter() - self._clock)
