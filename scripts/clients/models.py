"""Tiny models for the client checks: random multi-head ones, and what gqa-convert makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gqa_convert.conversion.execute import convert

HEADS, GROUPS, VOCAB = 8, (4, 2, 1), 320
IDS = [1, 17, 230, 44, 9, 101, 62, 305, 18, 250, 77, 5, 199, 33, 120, 264]

VARIANTS = {
    "llama": ("llama", {}),
    "llama, theta 50000": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    "llama, head_dim 32": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2 (biases)": ("qwen2", {}),
    "qwen3 (key norm)": ("qwen3", {"head_dim": 16}),
}
"""Name -> (model type, changes to its configuration)."""


def write_tokenizer(folder: Path) -> None:
    """Write a sentencepiece-like BPE with byte fallback, which every client can read."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["▁"]
    pieces += [chr(c) for c in range(ord("!"), ord("!") + VOCAB - len(pieces))]
    core = models.BPE(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_models(root: Path, variant: str) -> list[tuple[str, Path]]:
    """Write a variant's MHA model and its conversions, each with `reference.npz`; return (label, folder)."""
    model_type, changes = VARIANTS[variant]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(model_type, **(sizes | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake about them
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    source = root / variant.replace(", ", "-").replace(" ", "-").strip("()") / "mha"
    model.save_pretrained(source)
    write_tokenizer(source)
    folders = [(f"MHA {HEADS}", source)]
    for groups in GROUPS:
        made = convert(source, groups=groups, out=source.with_name(f"gqa{groups}"), force=True)
        folders.append((f"{'MQA' if groups == 1 else 'GQA'} {groups}", made.out))
    for _, folder in folders:
        write_reference(folder)
    return folders


def write_reference(folder: Path) -> None:
    """Save the logits that the installed transformers gives, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    np.savez(folder / "reference.npz", ids=np.array(IDS), logits=logits.numpy())
