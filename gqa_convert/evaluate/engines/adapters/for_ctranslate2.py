"""CTranslate2 on the CPU, by its own converter.

It has no way to hand it keys and values, but keeps those of a static prompt, which so is read once; and it calls back
at every token, which times the steps.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ctranslate2

CACHE = (
    "measured: how far the process's memory grows while it decodes, working space included; CTranslate2 does not say"
)


def version() -> str:
    """Engine and version."""
    return f"CTranslate2 {ctranslate2.__version__}"


class Model:
    """A generator and the prompt that it goes on from."""

    def __init__(self, folder: str, work: str, dtype: str, threads: int, batch: int, tokens: int) -> None:
        name = "float32" if dtype == "auto" else dtype
        out = f"{work}/ctranslate2"
        ctranslate2.converters.TransformersConverter(folder, low_cpu_mem_usage=True).convert(out, force=True)
        self._generator: Any = ctranslate2.Generator(out, compute_type=name, intra_threads=threads)
        self._vocabulary: list[str] = json.loads(Path(out, "vocabulary.json").read_text(encoding="utf-8"))
        size = Path(out, "model.bin").stat().st_size
        self.facts = {"dtype": name, "cache_dtype": str(self._generator.compute_type), "weight_bytes": size}
        self._before = self._grown = 0

    def _prompt(self, length: int, seed: int = 0) -> list[str]:
        size = len(self._vocabulary)
        return [self._vocabulary[3 + (place * 7919 + seed) % (size - 3)] for place in range(length)]

    def _run(self, prompts: list[list[str]], count: int, static: list[str] | None) -> list[float]:
        """When each token of the last sequence came."""
        times: dict[int, float] = {}

        def came(result: Any) -> bool:
            times[int(result.step)] = time.perf_counter()
            self._grown = max(self._grown, _resident() - self._before)
            return False

        self._generator.generate_batch(
            prompts, static_prompt=static, max_length=count, min_length=count, include_prompt_in_result=False,
            end_token=[], callback=came,
        )  # fmt: skip
        return [times[step] for step in sorted(times)]

    def prefill(self, batch: int, context: int) -> float:
        """Seconds to read prompts and give the next token."""
        prompts = [self._prompt(context, 1 + number) for number in range(batch)]
        started = time.perf_counter()
        return self._run(prompts, 1, None)[0] - started

    def fill(self, batch: int, context: int, room: int) -> None:
        """Have the static prompt read."""
        self.drop()
        self._before, self._grown = _resident(), 0
        self._static = self._prompt(context - 1)
        self._prompts = [self._prompt(1)] * batch
        self._run(self._prompts, 2, self._static)

    def cache_bytes(self) -> int:
        """What decoding took, once the prompt was kept."""
        return self._grown

    def steps(self, count: int) -> float:
        """Go on from the prompt; the first token comes with its reading and is not timed."""
        times = self._run(self._prompts, count + 1, self._static)
        return times[-1] - times[0]

    def drop(self) -> None:
        """Forget prompts, by loading the model anew."""
        self._generator.unload_model()
        self._generator.load_model()
        self._run([self._prompt(2)], 2, None)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
