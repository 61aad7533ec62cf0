"""What this machine does per second, by a short trial, and how much memory it has free. Torch waits until then."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SIZE = 1024
_CGROUP = Path("/sys/fs/cgroup")


def matmul_rate(dtype: torch.dtype | None = None) -> float:
    """Floating-point operations per second of a large matrix product, on the GPU where there is one.

    Of processors the time they worked is counted, so that whatever else runs on the machine does not matter.

    Args:
        dtype: of the product; float32 by default.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (torch.ones(_SIZE, _SIZE, dtype=dtype or torch.float32, device=device) for _ in range(2))
    on_gpu = device.type == "cuda"
    clock, units = (time.perf_counter, 1) if on_gpu else (time.process_time, torch.get_num_threads())
    best = float("inf")
    for _ in range(3):  # the first of them only wakes the machine
        started = clock()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return 2 * _SIZE**3 * units / max(best, 1e-9)


def has_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies in bfloat16 by instructions of its own: `cpu` by AVX-512 or AMX, or a GPU.

    The same answer every time, unlike a measured rate.
    """
    import torch

    if device != "cpu":
        return True
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test() for test in tests if test is not None)


def free_memory() -> int:
    """Return the bytes this process could still take without swapping, a container's limit included."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return free  # no limit, or another system's control groups
    return min(free, max(0, limit - used))
