"""Tiny folders to measure: a Llama, a T5Gemma, and a byte-level tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LINES = [f"The {n} grey geese flew {n * 7} miles over the cold sea, naïve and tired." for n in range(40)]


def write_tokenizer(folder: Path, *, sentinels: int = 0) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer that puts <s> first: 256 bytes and a few special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = [f"<extra_id_{i}>" for i in range(sentinels)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=extra,
    )
    fast.save_pretrained(folder)
    return fast


def write_llama(folder: Path, *, kv_heads: int = 4, seed: int = 0) -> Path:
    """Write a Llama of 2 layers, 4 heads of 8, context 64, with a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_lines(path: Path) -> Path:
    """Write the lines as .jsonl."""
    import json

    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES), encoding="utf-8")
    return path
