"""Engine check: vLLM on the CPU, in float32, by its own model classes or, where it has none, by transformers'."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import numpy as np
import vllm
from common import main


def log_probabilities_of(folder: Path, ids: list[int]) -> Any:
    """Log-probabilities of every token at every position, and what the cache takes per token."""
    engine = vllm.LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1, max_logprobs=-1,
        skip_tokenizer_init=True, trust_remote_code=True, enable_prefix_caching=False,
    )  # fmt: skip
    asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    answer = engine.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)[0]
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    values = np.full((len(ids), len(rows[0])), np.nan)
    for position, row in enumerate(rows):
        for token, entry in row.items():
            values[position, token] = entry.logprob
    return values, {"cache_bytes_per_token": _cache_bytes(engine)}


def _cache_bytes(engine: Any) -> float | None:
    try:
        runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        specs = runner.get_kv_cache_spec().values()
    except AttributeError:
        return None
    return float(sum(spec.page_size_bytes / spec.block_size for spec in specs))


if __name__ == "__main__":
    main(log_probabilities_of, lambda: f"vLLM {vllm.__version__}", logits=False)
