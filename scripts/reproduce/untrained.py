"""Untrained models with the embedded model's tokenizer, as folders that uptraining reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.embedded import CHECKPOINT

if TYPE_CHECKING:
    from scales import Scale, Shape

FAMILIES = ("decoder", "t5")
"""What is trained; results and pieces are kept by family."""

_SENTINELS = 100
"""T5's own number of them."""


def write_untrained(folder: Path, family: str, shape: Shape, scale: Scale, seed: int) -> int:
    """Write a model with random weights and as many KV heads as query heads, and its tokenizer.

    Returns:
        its number of parameters, embeddings included.
    """
    import torch

    torch.manual_seed(seed)
    tokenizer = _tokenizer(family)
    model = {"decoder": _decoder, "t5": _t5}[family](shape, scale, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _tokenizer(family: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    if family == "t5":
        sentinels = [f"<extra_id_{number}>" for number in range(_SENTINELS)]
        tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": sentinels})
    return tokenizer


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


def _t5(shape: Shape, scale: Scale, tokenizer: Any) -> Any:
    """T5.1.1's form: gated GELU, no dropout, an output matrix of its own.

    transformers draws that matrix with a variance of one, which makes the first losses several times the logarithm of
    the vocabulary; it is scaled to logits of variance one.
    """
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        t5_config(
            shape,
            vocabulary=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    model.lm_head.weight.data *= shape.width**-0.5
    return model


def t5_config(shape: Shape, *, vocabulary: int, **more: Any) -> Any:
    """A T5.1.1-shaped configuration: `layers` in the encoder and as many in the decoder."""
    from transformers import T5Config

    return T5Config(
        vocab_size=vocabulary,
        d_model=shape.width,
        d_kv=shape.width // shape.heads,
        d_ff=shape.mlp,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_heads=shape.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **{"tie_word_embeddings": False, **more},
    )
