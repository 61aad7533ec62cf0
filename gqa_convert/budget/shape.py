"""The sizes of a model that its training cost depends on, from published figures or from a checkpoint's headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.dtypes import BITS, FLOATS
from gqa_convert.errors import UsageError

_FILE = Path(__file__).with_name("pretraining_budgets.json")

_TARGET_SHARE = 114 / 512
"""Decoder tokens for one encoder token in T5's span corruption: 512 input tokens go with 114 target tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the arithmetic of a model's cost needs.

    Attributes:
        name: for messages.
        parameters: all of them.
        matmul_parameters: those that take part in a matrix product for a token (an untied input embedding does not).
        encoder_parameters: the part of `matmul_parameters` in the encoder; 0 without one.
        layers: attention layers (decoder layers of an encoder-decoder, which also has as many in its encoder).
        attention_width: query heads x head_dim.
        context: tokens of a sequence in pretraining.
        weight_bytes: bytes of one weight as stored.
        hidden_size: width of the hidden states; 0 where it is not known, and so below.
        vocab_size: tokens of the vocabulary.
        kv_width: KV heads x head_dim.
    """

    name: str
    parameters: int
    matmul_parameters: int
    encoder_parameters: int = 0
    layers: int
    attention_width: int
    context: int
    weight_bytes: int = 2
    hidden_size: int = 0
    vocab_size: int = 0
    kv_width: int = 0

    def training_flops_per_token(self, context: int | None = None) -> float:
        """FLOPs of a forward and a backward pass for one (input) token: 6 a parameter, and attention.

        Attention is 12 x layers x attention width x context, counted in full as in PaLM's appendix B (Chowdhery et al.
        2022): masking halves the useful work, which many kernels do not exploit.
        """
        length = self.context if context is None else context
        decoder = self.matmul_parameters - self.encoder_parameters
        if not self.encoder_parameters:
            return 6.0 * decoder + 12.0 * self.layers * self.attention_width * length
        share = _TARGET_SHARE
        # Encoder over its tokens, decoder over its own, and decoder tokens over encoder tokens.
        attention = length * (1 + share * share + share)
        linear = 6.0 * (self.encoder_parameters + share * decoder)
        return linear + 12.0 * self.layers * self.attention_width * attention


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A published pretraining: its shape, tokens, tokens per step where stated, and where the figures stand."""

    shape: ModelShape
    tokens: int
    batch_tokens: int | None
    steps: int | None
    source: str


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return tables


def known_models() -> dict[str, KnownModel]:
    """Return every published pretraining in the data file, by name."""
    return {name: _known(name, entry) for name, entry in _tables()["models"].items()}


def devices() -> dict[str, dict[str, Any]]:
    """Return common devices: peak dense bf16 TFLOP/s, memory in GB, the driver's name for them, and a source."""
    devices: dict[str, dict[str, Any]] = _tables()["devices"]
    return devices


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of the device that its driver calls `device_name`; None if it is not in the table."""
    matches = [entry for entry in devices().values() if entry["match"].lower() in device_name.lower()]
    best = max(matches, key=lambda entry: len(entry["match"]), default=None)
    return float(best["tflops"]) * 1e12 if best else None


def known_model(name: str) -> KnownModel:
    """Look up a published pretraining.

    Raises:
        UsageError: if the name is unknown, with the nearest ones.
    """
    models = _tables()["models"]
    if name not in models:
        near = get_close_matches(name.lower(), models, n=3) or sorted(models)[:5]
        raise UsageError(
            f"{name!r}: no published pretraining budget is on file. Nearest: {', '.join(near)} "
            "(`gqa budget --list` shows all). Give the pretraining tokens yourself."
        )
    return _known(name, models[name])


def _known(name: str, entry: dict[str, Any]) -> KnownModel:
    embedding = entry["vocab_size"] * entry["hidden_size"]
    matmul = entry["parameters"] - (0 if entry["tied"] else embedding)
    encoder = 0
    if entry.get("encoder_decoder"):
        # A T5 decoder layer has one attention block more than an encoder layer; the rest is alike.
        cross = 4 * entry["hidden_size"] * entry["attention_width"] * entry["layers"]
        encoder = (matmul - embedding - cross) // 2
    shape = ModelShape(
        name=name,
        parameters=entry["parameters"],
        matmul_parameters=matmul,
        encoder_parameters=encoder,
        layers=entry["layers"],
        attention_width=entry["attention_width"],
        context=entry["context"],
        hidden_size=entry["hidden_size"],
        vocab_size=entry["vocab_size"],
        kv_width=entry.get("kv_width", entry["attention_width"]),
    )
    return KnownModel(
        shape=shape,
        tokens=entry["tokens"],
        batch_tokens=entry.get("batch_tokens"),
        steps=entry.get("steps"),
        source=entry["source"],
    )


def shape_of_folder(folder: Path) -> ModelShape:
    """Read a checkpoint folder's shape from its config.json and tensor headers; no weight is read, torch not imported.

    Raises:
        CheckpointError: if the folder is not a checkpoint.
        UsageError: if its config.json does not say how many layers or heads there are.
    """
    from gqa_convert.checkpoint.config_json import stated_context
    from gqa_convert.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    text: dict[str, Any] = next(
        (config[key] for key in ("text_config", "llm_config", "decoder") if isinstance(config.get(key), dict)), config
    )
    hidden = _first(folder, text, "hidden_size", "d_model", "n_embd", "dim")
    heads = _first(folder, text, "num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads")
    stated = [name for name in ("head_dim", "d_kv") if text.get(name)]
    head_dim = _first(folder, text, *stated) if stated else hidden // heads
    sizes = {key: _elements(info.shape) for key, info in checkpoint.tensors.items()}
    vocab = _first(folder, text, "vocab_size") if "vocab_size" in text else 0
    tables = [key for key, info in checkpoint.tensors.items() if tuple(info.shape) == (vocab, hidden)]
    encoder = sum(count for key, count in sizes.items() if key.startswith(("encoder.", "model.encoder.")))
    dtypes = [BITS[info.dtype] // 8 if info.dtype in FLOATS else 2 for info in checkpoint.tensors.values()]
    total = sum(sizes.values())
    return ModelShape(
        name=folder.resolve().name,
        parameters=total,
        matmul_parameters=total - (sizes[tables[0]] if len(tables) > 1 else 0),
        encoder_parameters=encoder,
        layers=_first(
            folder, text, "num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers", "n_layer"
        ),
        attention_width=heads * head_dim,
        context=stated_context(text.get) or 2048,
        weight_bytes=max(set(dtypes), key=dtypes.count),
        hidden_size=hidden,
        vocab_size=vocab,
        kv_width=_kv_heads(folder, text, heads) * head_dim,
    )


def _kv_heads(folder: Path, config: dict[str, Any], heads: int) -> int:
    """KV heads of a layer; where every layer states its own, their mean, rounded up."""
    stated = config.get("num_key_value_heads")
    if not stated:
        return heads
    if isinstance(stated, list):
        counts = [_first(folder, {"num_key_value_heads": count}, "num_key_value_heads") for count in stated]
        return -(-sum(counts) // len(counts))
    return _first(folder, config, "num_key_value_heads")


def _first(folder: Path, config: dict[str, Any], *names: str) -> int:
    """The first of these settings that is a whole number above 0."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    what = " and ".join(f"{name} is {config[name]!r:.80}" for name in names if name in config) or "they are missing"
    raise UsageError(
        f"{folder / 'config.json'}: {' or '.join(names)} must be a whole number above 0, and {what}; "
        "its cost cannot be computed."
    )


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
