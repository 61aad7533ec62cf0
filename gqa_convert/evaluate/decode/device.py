"""What the benchmark needs of a device: a clock that waits for it, its peak memory, its memory bandwidth."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC = Path("/proc/self")
_PROBE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run` takes, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


@dataclass
class Peak:
    """Bytes above the level at the start that were in use at most; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure how far memory in use rises above its present level.

    On a GPU as torch's allocator counts it. On the CPU as Linux counts the process's resident memory (its high-water
    mark is reset first); elsewhere it stays None.
    """
    peak = Peak()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    gc.collect()  # or what is freed in the meantime would hide what is taken
    level = _reset_high_water()
    yield peak
    if level is not None:
        peak.bytes = max(0, _status("VmHWM") - level)


def _reset_high_water() -> int | None:
    try:
        (_PROC / "clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, StopIteration, ValueError):
        return None


def _status(field: str) -> int:
    line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


@torch.inference_mode()
def read_bandwidth(device: torch.device, *, repeats: int = 5) -> float:
    """Measure the fastest rate at which the device reads memory, in bytes per second.

    The best of a sum and a matrix-vector product over a block much larger than the caches, so that a floor computed
    from it is not passed by anything.
    """
    count = _PROBE_BYTES.get(device.type, 256 << 20) // 4
    width = 1 << 13
    block = torch.ones(count // width, width, device=device)
    vector = torch.ones(width, device=device)
    best = 0.0
    runs: tuple[Callable[[], object], ...] = (block.sum, lambda: torch.mv(block, vector))
    for run in runs:
        run()
        best = max([best] + [block.nbytes / timed(run, device) for _ in range(repeats)])
    return best


def describe(device: torch.device) -> str:
    """The device in words: a GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
