"""Tiny models for the engine checks: random multi-head ones of many families, and what gqa-convert makes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import gqa_convert  # noqa: F401  (the Auto classes know its model types from here on)
from gqa_convert.conversion.execute import convert
from gqa_convert.tiny.model import tiny_model
from gqa_convert.uptrain.export import both_spellings

HEADS, HEAD_DIM, VOCAB = 8, 32, 320
WIDTH = HEADS * HEAD_DIM
IDS = [1, 17, 230, 44, 9, 101, 62, 305, 18, 250, 77, 5, 199, 33, 120, 264]
SOURCE_IDS = [88, 19, 240, 7, 61, 133, 301, 2]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GPT_SIZES = {
    "vocab_size": VOCAB,
    "n_positions": 256,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": HEADS,
    "n_inner": 4 * WIDTH,
}
T5_SIZES = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": HEAD_DIM,
    "d_ff": 512,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "tie_word_embeddings": False,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
BART_SIZES = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def _rope(theta: float, share: float | None = None) -> dict[str, Any]:
    own = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": own | ({} if share is None else {"partial_rotary_factor": share})}


@dataclass(frozen=True)
class Case:
    """A multi-head model and how it is converted.

    Attributes:
        model_type: of the source.
        changes: to its configuration.
        groups: KV heads to convert to, in turn: one number for all layers, or one for each.
        route: how it becomes a grouped-query model: `setting`, `native` (another family) or `remote-code`.
        sizes: what its configuration calls its sizes.
        spelling: `both` spellings of rotary settings and dtype in the source, or those of transformers `5` alone.
    """

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    groups: tuple[int | tuple[int, ...], ...] = (2,)
    route: str = "setting"
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    spelling: str = "both"


_NEOX = {"intermediate_size": 4 * WIDTH, "hidden_act": "gelu", "num_key_value_heads": None}
CASES = {
    "Llama": Case("llama", groups=(4, 2, 1)),
    "Llama, theta 50,000": Case("llama", _rope(50000.0), spelling="5"),
    "Llama, head_dim 64": Case("llama", {"head_dim": 64}),
    "Llama, uneven": Case("llama", {"num_hidden_layers": 4}, groups=((HEADS, 2, 1, 4),)),
    "Mistral": Case("mistral", {"sliding_window": None}),
    "Mixtral": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": Case("qwen2"),
    "Qwen3": Case("qwen3", {"head_dim": HEAD_DIM}),
    "Gemma": Case("gemma", {"head_dim": HEAD_DIM, "tie_word_embeddings": True}),
    "Gemma 2": Case("gemma2", {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": True}),
    "Gemma 3": Case(
        "gemma3_text",
        {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": True, "num_hidden_layers": 6},
    ),
    "Phi": Case("phi", {"intermediate_size": 4 * WIDTH}, groups=(2, 1)),
    "Phi-3": Case("phi3"),
    "OLMo": Case("olmo"),
    "OLMo 2": Case("olmo2"),
    "OLMo 3": Case("olmo3", {"num_hidden_layers": 4}),
    "Cohere": Case("cohere", {"tie_word_embeddings": True}),
    "Granite": Case("granite"),
    "StableLM": Case("stablelm"),
    "StarCoder2": Case("starcoder2"),
    "Nemotron": Case("nemotron"),
    "gpt-oss": Case(
        "gpt_oss", {"head_dim": HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    ),
    "Falcon": Case("falcon", {"multi_query": False, "new_decoder_architecture": False, "num_kv_heads": HEADS}, (1,)),
    "GPTBigCode": Case("gpt_bigcode", {"multi_query": False}, (1,), sizes=GPT_SIZES),
    # 16 rotary values a head, as Pythia-70M has (a quarter of 64); half of them are too few for GenAI's kernel.
    "Pythia": Case("gpt_neox", {**_NEOX, **_rope(10000.0, 0.5)}, (2, 1), "native"),
    "GPT-NeoX, sequential": Case(
        "gpt_neox", {**_NEOX, **_rope(10000.0, 1.0), "use_parallel_residual": False}, (2,), "native"
    ),
    "GPT-NeoX, sequential, partly rotary": Case(
        "gpt_neox", {**_NEOX, **_rope(10000.0, 0.5), "use_parallel_residual": False}, (2,), "native"
    ),
    "GPT-J": Case("gptj", {"rotary_dim": 16}, (2,), "native", GPT_SIZES),
    "CodeGen": Case("codegen", {"rotary_dim": 16, "n_ctx": 256}, (2,), "native", GPT_SIZES),
    "GPT-2 (one group)": Case("gpt2", {}, (1,), "native", GPT_SIZES),
    "OPT (one group)": Case("opt", {"ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH}, (1,), "native"),
    "GPT-2": Case("gpt2", {}, (2,), "remote-code", GPT_SIZES),
    "OPT": Case("opt", {"ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH}, (2,), "remote-code"),
    "T5": Case("t5", {}, (2,), "remote-code", T5_SIZES),
    "BART": Case("bart", {}, (2,), "remote-code", BART_SIZES),
}
"""Name -> the model and how it is converted."""


def write_tokenizer(folder: Path) -> None:
    """Write a sentencepiece-like BPE with byte fallback, which every engine can read."""
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


def write_models(root: Path, name: str) -> list[tuple[str, Path]]:
    """Write a case's MHA model and its conversions, each with `reference.npz`; return (label, folder).

    The first is the control: what an engine gets wrong of it as well is the engine's own.
    """
    case = CASES[name]
    sizes = {key: value for key, value in case.sizes.items() if case.changes.get(key, value) is not None}
    changes = {key: value for key, value in case.changes.items() if value is not None or key not in case.sizes}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(case.model_type, **(tokens | sizes | changes))
    source = root / "".join(c if c.isalnum() else "-" for c in name.lower()) / "mha"
    tiny_model(config).save_pretrained(source)
    write_tokenizer(source)
    if case.spelling == "both":
        file = source / "config.json"
        values = json.loads(both_spellings(source, file.read_text(encoding="utf-8")))
        if case.model_type == "gpt_neox":  # which called the rotary share otherwise before transformers 5
            values |= {"rotary_pct": values["partial_rotary_factor"], "rotary_emb_base": values["rope_theta"]}
        if case.model_type == "gpt2":
            values |= {"n_ctx": values["n_positions"]}
        file.write_text(json.dumps(values, indent=2), encoding="utf-8")
    folders = [(f"MHA {HEADS}", source)]
    for groups in case.groups:
        route = "auto" if case.route == "setting" else case.route
        label = f"{'MQA' if groups == 1 else 'GQA'} {groups}"
        if isinstance(groups, tuple):
            label = f"uneven {','.join(map(str, groups))}"
        out = source.with_name(label.lower().replace(" ", "").replace(",", "-"))
        done = convert(source, groups=groups, out=out, force=True, route=route)
        folders.append((label, done.out))
    for _, folder in folders:
        write_reference(folder)
    return folders


def written_type(folder: Path) -> str:
    """The model type that a folder's config.json names."""
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])


def write_reference(folder: Path) -> None:
    """Save the logits that the installed transformers gives, in float32, by shipped code where there is any."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    arrays: dict[str, Any] = {"ids": np.array(IDS)}
    inputs = {"input_ids": torch.tensor([IDS]), "use_cache": False}
    auto: Any = AutoModelForCausalLM
    if config.is_encoder_decoder:
        arrays["source_ids"] = np.array(SOURCE_IDS)
        inputs = {"input_ids": torch.tensor([SOURCE_IDS]), "decoder_input_ids": torch.tensor([IDS]), "use_cache": False}
        auto = AutoModelForSeq2SeqLM
    model = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    np.savez(folder / "reference.npz", **arrays, logits=logits.numpy())
