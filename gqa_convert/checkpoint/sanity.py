"""Recognises what wrappers and trainers leave in place of a model's weights, and configurations beyond all reason.

Each of these would be refused somewhere later, as a missing tensor or a wrong shape, or would never end; here the
message can name what happened to the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.errors import CheckpointError

if TYPE_CHECKING:
    from gqa_convert.checkpoint.safetensors_file import TensorInfo

_WRAPPERS = {
    "_orig_mod.": "torch.compile's wrapper: save the state dict of `model._orig_mod`",
    "_forward_module.": "Lightning's wrapper: save the state dict of the module inside",
    "_fsdp_wrapped_module.": "FSDP's wrapper: save a full state dict",
    "module.": "DataParallel's wrapper: save the state dict of `model.module`",
    "base_model.model.": "PEFT's wrapper: call merge_and_unload() and save_pretrained() on what it returns",
}
_LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)(\.|$)")
_COUNTS = re.compile(r"(layers?|depths?|blocks?)$", re.IGNORECASE)
_WIDTHS = re.compile(r"(heads?|experts?|groups?|codebooks?|stages?)$", re.IGNORECASE)
_USUAL_LAYERS = 1000
_MOST_WIDE = 1 << 16


def check_names(folder: Path, keys: Collection[str]) -> None:
    """Refuse tensors that were saved together with a wrapper around the model.

    Raises:
        CheckpointError: naming the wrapper and what to do.
    """
    for prefix, what in _WRAPPERS.items():
        if keys and all(key.startswith(prefix) for key in keys):
            lora = _first_lora(keys)
            more = f"; it also holds unmerged LoRA tensors ({lora})" if lora else ""
            raise CheckpointError(
                f"{folder}: every tensor's name begins with {prefix!r}, which no transformers model expects. It comes "
                f"from {what}{more}."
            )
    nested = [key for key in keys if "._orig_mod." in key]
    if nested:
        raise CheckpointError(
            f"{folder}: {nested[0]!r} and {len(nested) - 1} more names contain '_orig_mod', torch.compile's wrapper. "
            "Save the state dict of the model without it."
        )
    lora = _first_lora(keys)
    if lora:
        raise CheckpointError(
            f"{folder}: holds unmerged LoRA tensors ({lora}), so the weights are not a plain model's. Merge them: "
            "merge_and_unload(), then save_pretrained()."
        )


def foreign_prefix(keys: Collection[str], missing: str) -> str:
    """What to add to the news that a tensor is missing: that it is there under a name with something before it."""
    longer = next((key for key in keys if key.endswith(f".{missing}")), None)
    if longer is None:
        return ""
    prefix = longer.removesuffix(missing)
    every = "Every" if all(key.startswith(prefix) for key in keys) else "A"
    return f" {every} tensor's name begins with {prefix!r}, as a wrapper around the model leaves it: save without it."


def _first_lora(keys: Collection[str]) -> str | None:
    return next((key for key in keys if _LORA.search(key)), None)


def check_filled(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse weights that were emptied before they were saved, as DeepSpeed ZeRO-3 leaves them.

    Raises:
        CheckpointError: naming the first.
    """
    empty = [key for key, info in tensors.items() if info.shape == (0,) and key.endswith((".weight", ".bias"))]
    if empty:
        raise CheckpointError(
            f"{folder}: {empty[0]!r} {f'and {len(empty) - 1} more tensors are' if len(empty) > 1 else 'is'} empty "
            "(shape [0]), as DeepSpeed ZeRO-3 saves parameters that lie on other processes. Make the whole weights "
            "from the training checkpoint with its zero_to_fp32.py."
        )


def check_types(where: Path, config: Mapping[str, Any]) -> None:
    """Refuse values of a kind that no reader of config.json expects where they stand.

    Raises:
        CheckpointError: naming the field.
    """
    for path, value in _sections(config):
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{where}: {_dotted(path)} is {_kind(value)}, not a JSON object.")
        for key, kinds, called in _KINDS:
            if not isinstance(value.get(key), (*kinds, type(None))):
                raise CheckpointError(f"{where}: {_dotted(path, key)} is {_kind(value[key])}, not {called}.")
        for inner, called in (("architectures", "text"), ("layer_types", "text")):
            listed = value.get(inner) or []
            if not all(isinstance(each, str) and each.isprintable() for each in listed):
                raise CheckpointError(f"{where}: {_dotted(path, inner)} holds something else than {called}.")
        for key in ("dtype", "torch_dtype"):
            if isinstance(value.get(key), str) and value[key].removeprefix("torch.") not in _DTYPES:
                raise CheckpointError(f"{where}: {_dotted(path, key)} is {value[key][:40]!a}, no format of numbers.")


_SECTION = re.compile(
    r"(text|vision|audio|decoder|encoder|generator|thinker|talker|llm|language|speech)_config|decoder|encoder"
)
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("model_type", (str,), "text"),
    ("architectures", (list,), "a list"),
    ("layer_types", (list,), "a list"),
    ("auto_map", (dict,), "a JSON object"),
    ("quantization_config", (dict,), "a JSON object"),
    ("rope_scaling", (dict,), "a JSON object"),
    ("rope_parameters", (dict,), "a JSON object"),
    ("attn_config", (dict,), "a JSON object"),
    ("dtype", (str, dict), "the name of a floating format"),
    ("torch_dtype", (str, dict), "the name of a floating format"),
)
_DTYPES = frozenset(
    ["float16", "bfloat16", "float32", "float64", "half", "float", "double", "auto", "fp16", "bf16", "fp32"]
) | {f"float8_{kind}" for kind in ("e4m3fn", "e5m2", "e8m0fnu", "e4m3fnuz", "e5m2fnuz")}


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The configuration and those nested in it, which are named by their part of the model."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), config)]
    while waiting:
        path, value = waiting.pop()
        yield path, value
        for key, inner in value.items() if isinstance(value, Mapping) else ():
            if _SECTION.fullmatch(key) and inner is not None:
                waiting.append(((*path, key), inner))


def _dotted(path: tuple[str, ...], *more: str) -> str:
    return ascii(".".join((*path, *more)))


def _kind(value: Any) -> str:
    return {dict: "a JSON object", list: "a list", str: "text", bool: "a truth value"}.get(type(value), "a number")


def check_counts(where: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse numbers of layers, heads or experts that building the model would never come to the end of.

    Args:
        where: config.json, for the message.
        config: its contents.
        tensors: how many the weights hold; every layer has one at least.

    Raises:
        CheckpointError: naming the field.
    """
    for path, value in _numbers(config):
        name = path[-1]
        if _COUNTS.search(name) and value > max(_USUAL_LAYERS, tensors):
            raise CheckpointError(
                f"{where}: {'.'.join(path)!a} is {_spelled(value)}, but the weights hold only {tensors:,} tensors."
            )
        if _WIDTHS.search(name) and value > _MOST_WIDE:
            raise CheckpointError(f"{where}: {'.'.join(path)!a} is {_spelled(value)}, more than any model has.")


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], int | float]]:
    waiting: list[tuple[tuple[str, ...], Any]] = [((), values)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [((*path, str(key)), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(path, inner) for inner in value]
        elif path and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield path, value


def _spelled(value: int | float) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length():,} bits"
    return f"{value:,}"
