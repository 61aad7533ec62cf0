"""Untrained models with the embedded model's tokenizer, as folders that uptraining reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.demo.run import CHECKPOINT

if TYPE_CHECKING:
    from scales import Scale, Shape

FAMILIES = ("decoder",)
"""What is trained; results and pieces are kept by family."""


def write_untrained(folder: Path, family: str, shape: Shape, scale: Scale, seed: int) -> int:
    """Write a model with random weights and as many KV heads as query heads, and its tokenizer.

    Returns:
        its number of parameters, embeddings included.
    """
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = {"decoder": _decoder}[family](shape, scale, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def decoder_config(shape: Shape, *, vocabulary: int, context: int, kv_heads: int | None = None, **more: Any) -> Any:
    """A Llama-shaped decoder's configuration; MHA unless `kv_heads` says otherwise."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=kv_heads or shape.heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **more,
    )


def _decoder(shape: Shape, scale: Scale, tokenizer: Any) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(
        decoder_config(
            shape,
            vocabulary=len(tokenizer),
            context=scale.context,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
