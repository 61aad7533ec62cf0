"""Llama-like models whose layers differ in KV heads: how they are written, and which models can be.

They are written as `nemotron-nas`, a configuration that engines know; for transformers, which does not,
`modeling_uneven.py` goes along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("modeling_uneven.py")
MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
FIELD = "block_configs"

LIKE_LLAMA = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""Model types that compute what Llama does, with the class whose tensors go by the same names."""

_ENGINES_FFN = 256
"""llama.cpp and mlx-lm take feed-forward sizes in multiples of this many only."""


def is_uneven(values: Any) -> bool:
    """Tell from a configuration, or config.json as parsed, whether it is of the kind written here.

    NVIDIA's own models of this model type bring other code, which its `auto_map` names.
    """
    if isinstance(values, Mapping):
        model_type, auto_map = values.get("model_type"), values.get("auto_map")
    else:
        model_type, auto_map = getattr(values, "model_type", None), getattr(values, "auto_map", None)
    if model_type != MODEL_TYPE:
        return False
    if hasattr(type(values), "kv_heads"):  # the configuration of the shipped file
        return True
    return isinstance(auto_map, Mapping) and auto_map.get("AutoModelForCausalLM") == f"{FILE.stem}.{ARCHITECTURE}"


def config_class() -> Any:
    """Return the configuration class of the shipped file."""
    from gqa_convert.modeling import modeling_uneven

    return modeling_uneven.DeciLMConfig


def model_class() -> Any:
    """Return the model class of the shipped file."""
    from gqa_convert.modeling import modeling_uneven

    return modeling_uneven.DeciLMForCausalLM


def refusal(config: Any, class_name: str) -> str:
    """Return why a model cannot be written with different KV heads in its layers; empty if it can.

    Args:
        config: the model's configuration.
        class_name: its class.
    """
    model_type = str(config.model_type)
    wanted = LIKE_LLAMA.get(model_type)
    if wanted is None:
        return (
            "transformers and the engines give every layer of it the same number of KV heads. Llama-like models "
            f"({', '.join(LIKE_LLAMA)}) and those that go with modelling code of this package (`gqa families`: remote "
            "code) can differ; for this one use --groups"
        )
    if class_name != wanted:
        return f"it holds a {class_name}; only a {wanted} is written with a number of KV heads for each layer"
    width = config.hidden_size // config.num_attention_heads
    if (config.head_dim or width) * config.num_attention_heads != config.hidden_size:
        return (
            f"its head_dim ({config.head_dim}) is not hidden_size / num_attention_heads ({width}), which the "
            f"{MODEL_TYPE} form counts on"
        )
    if getattr(config, "sliding_window", None) is not None:
        return f"it has a sliding window ({config.sliding_window}), which the {MODEL_TYPE} form has not"
    return ""


def block_configs(config: Any, kv_heads: Sequence[int]) -> list[dict[str, Any]]:
    """Return the blocks of a Llama-like configuration with the KV heads of each layer."""
    ffn: dict[str, Any] = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    if config.intermediate_size % _ENGINES_FFN == 0:
        ffn["ffn_mult"] = _ffn_mult(config.intermediate_size, config.hidden_size)
    else:
        ffn["intermediate_size"] = config.intermediate_size
    return [
        {
            "attention": {
                "n_heads_in_group": config.num_attention_heads // heads,
                "no_op": False,
                "num_sink_tokens": None,
                "replace_with_linear": False,
                "sparsify": None,
                "unshifted_sink": False,
                "use_prefill_window_in_sink_attention": False,
                "window_length": None,
            },
            "ffn": dict(ffn),
        }
        for heads in kv_heads
    ]


def _ffn_mult(size: int, width: int) -> float:
    """The multiple of which engines get a feed-forward size back: int(2 * mult * width / 3), rounded up to 256."""
    exact = 3 * size / (2 * width)
    return exact if int(2 * exact * width / 3) == size else 3 * (size - 0.5) / (2 * width)


def config_values(config: Any, kv_heads: Sequence[int]) -> dict[str, Any]:
    """Return what config.json must say of a Llama-like model whose layers have `kv_heads`, beside what it says.

    `num_key_value_heads` is null there: whoever knows no `block_configs` should stumble rather than read a wrong one.
    """
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{FILE.stem}.DeciLMConfig",
            "AutoModel": f"{FILE.stem}.DeciLMModel",
            "AutoModelForCausalLM": f"{FILE.stem}.{ARCHITECTURE}",
        },
        "num_key_value_heads": None,
        FIELD: block_configs(config, kv_heads),
    }


def engine_note(config: Any) -> str:
    """Return which engines read the blocks of a configuration."""
    if config.intermediate_size % _ENGINES_FFN:
        return (
            "vLLM was checked to read it; llama.cpp and mlx-lm cannot: its feed-forward size "
            f"({config.intermediate_size}) is no multiple of {_ENGINES_FFN}, which their form of {MODEL_TYPE} counts on"
        )
    return "llama.cpp (as `deci`), mlx-lm and vLLM were checked to read the KV heads of each layer"
