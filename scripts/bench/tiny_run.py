"""A run of `gqa uptrain` that takes a second: tiny Llamas with a tokenizer, text of each kind, a configuration."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the", "a", "cat", "dog", "bird", "fish", "sees", "hears", "likes", "finds", "big", "small",
    "red", "blue", "house", "tree", "river", "stone", "and", "or", "then",
]  # fmt: skip


def make_model(folder: Path, *, kv_heads: int = 2, seed: int = 0, sharpness: float = 1.0, **config: Any) -> Path:
    """Write a Llama of 15,000 parameters that looks converted, with a word tokenizer.

    Args:
        folder: to write to.
        kv_heads: of four query heads.
        seed: of its weights.
        sharpness: factor on its logits; a random model's hardly differ.
        config: fields that are set otherwise than here.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    settings = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        vocab_size=len(vocabulary), max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **config,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(settings)
    model.lm_head.weight.data *= sharpness
    model.save_pretrained(folder)
    (folder / "gqa_convert.json").write_text(json.dumps({"format": 1, "conversion": {"method": "mean"}}))
    return folder


def make_text(folder: Path, *, documents: int = 150) -> None:
    """Write the same documents as .jsonl, .jsonl.gz, .txt (a line each) and .parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(4, 40))) for _ in range(documents)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(rows)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    (folder / "text.txt").write_text("".join(f"{text}\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")


def settings(**changes: Any) -> dict[str, Any]:
    """A configuration whose paths are relative to the folder that model and text lie in."""
    base: dict[str, Any] = {
        "model": "model",
        "output": "run",
        "budget": {"steps": 6},
        "data": {
            "source": {"kind": "jsonl", "paths": ["data/text.jsonl"]},
            "context": 32,
            "held_out_fraction": 0.05,
            "window": 8,
        },
        "schedule": {"kind": "cosine", "peak": 0.01, "warmup_fraction": 0.1},
        "train": {"batch_sequences": 2, "micro_batch": 2, "precision": "float32", "device": "cpu"},
        "checkpoints": {"every_steps": 2},
        "evaluation": {"tokens": 200},
        "log": {"trackers": []},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base
