"""vLLM in this process, on whatever device it was built for.

Its scheduler is stepped by hand. Prompts differ from sequence to sequence, so that none shares another's blocks, and
stay in its prefix cache from round to round, so that they are read once.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
import vllm

CACHE = "read from the engine: bytes per token of its cache's specification, times tokens"


def version() -> str:
    """Engine and version."""
    return f"vLLM {vllm.__version__}"


class Model:
    """An engine and the prompts that it goes on from."""

    def __init__(self, folder: str, work: str, dtype: str, threads: int, batch: int, tokens: int) -> None:
        torch.set_num_threads(threads)
        self._engine: Any = vllm.LLM(
            model=folder, dtype=dtype, enforce_eager=not torch.cuda.is_available(), max_model_len=tokens,
            max_num_seqs=batch, skip_tokenizer_init=True, enable_prefix_caching=True,
        )  # fmt: skip
        runner = self._engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        specs = list(runner.get_kv_cache_spec().values())
        self._per_token = sum(spec.page_size_bytes / spec.block_size for spec in specs)
        weights = sum(parameter.nbytes for parameter in runner.model.parameters())
        name = str(next(runner.model.parameters()).dtype).removeprefix("torch.")
        kept = str(getattr(specs[0], "dtype", name)).removeprefix("torch.")
        self.facts = {"dtype": name, "cache_dtype": kept, "weight_bytes": weights}
        self._vocabulary = int(runner.model_config.get_vocab_size())
        self._asked = 0

    def _prompts(self, batch: int, context: int, seed: int) -> list[list[int]]:
        draw = torch.Generator().manual_seed(seed)
        ids: list[list[int]] = torch.randint(3, self._vocabulary, (batch, context), generator=draw).tolist()
        return ids

    def _run(self, prompts: list[list[int]], count: int) -> tuple[float, float]:
        """Seconds until all have their first token, and from then on until all have `count`."""
        core = self._engine.llm_engine
        wanted = vllm.SamplingParams(
            max_tokens=count, min_tokens=count, temperature=0, ignore_eos=True, detokenize=False
        )
        for ids in prompts:
            self._asked += 1
            core.add_request(str(self._asked), {"prompt_token_ids": ids}, wanted)
        have: dict[str, int] = {}
        started = time.perf_counter()
        first = None
        while core.has_unfinished_requests():
            for output in core.step():
                have[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and len(have) == len(prompts):
                first = time.perf_counter()
                ahead = sum(have.values()) - len(have)
                if ahead:
                    raise RuntimeError("vLLM decodes some sequences before it has read the others: fewer at a time")
        assert first is not None
        return first - started, time.perf_counter() - first

    def prefill(self, batch: int, context: int) -> float:
        """Seconds to read prompts that it has not seen."""
        self._engine.reset_prefix_cache()
        return self._run(self._prompts(batch, context, self._asked + 1), 1)[0]

    def fill(self, batch: int, context: int, room: int) -> None:
        """Have the prompts read."""
        self._batch, self._length = batch, context
        self._kept = self._prompts(batch, context, 0)
        for ids in self._kept:
            self._run([ids], 1)

    def cache_bytes(self) -> int:
        """Bytes of all sequences."""
        return int(self._per_token * self._batch * self._length)

    def steps(self, count: int) -> float:
        """Go on from the prompts."""
        return self._run(self._kept, count + 1)[1]

    def drop(self) -> None:
        """Forget the prompts."""
        self._engine.reset_prefix_cache()
