"""Llama whose layers have different numbers of KV heads, for transformers.

This one file lies beside the weights of a converted model and needs nothing but torch and transformers. The
configuration is the one that engines know as `nemotron-nas` (NVIDIA's DeciLM): `block_configs[i].attention` says of
layer i how many query heads read each of its KV heads (`n_heads_in_group`). All else is transformers' own Llama, whose
forward pass reads the number of KV heads off the tensors. Blocks without attention or with a feed-forward part of
another size, which DeciLM knows too, are refused.

Written by gqa-convert. Licence: Apache-2.0.
"""

import copy
import dataclasses
from typing import Any

import transformers
from torch import nn

MINIMUM = 5  # the release of transformers whose classes this file stands on

if int(transformers.__version__.partition(".")[0]) < MINIMUM:
    raise ImportError(
        f"This model's own code needs transformers {MINIMUM} or later; this is {transformers.__version__}. "
        "pip install -U transformers"
    )
try:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
except ImportError as error:
    raise ImportError(
        f"This model's own code finds {error.name or 'a module'} changed in transformers {transformers.__version__}: "
        "it was written against 5.23."
    ) from error


class Settings(dict[str, Any]):
    """A JSON object whose entries are attributes too, as engines read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __deepcopy__(self, memo: Any) -> "Settings":
        return Settings({name: copy.deepcopy(value, memo) for name, value in self.items()})


class Layers(list[Any]):
    """One configuration for each layer; transformers also asks for that of a kind of layers, which is the whole one."""

    whole: Any = None

    def __getitem__(self, index: Any) -> Any:
        return self.whole if isinstance(index, str) else super().__getitem__(index)


class DeciLMConfig(LlamaConfig):
    """LlamaConfig with the KV heads of each layer; without `block_configs`, `num_key_value_heads` are those of all."""

    model_type = "nemotron-nas"
    _auto_class = "AutoConfig"

    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the blocks and make their entries attributes."""
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.read_blocks()

    def read_blocks(self) -> None:
        """Check the blocks and make their entries attributes."""
        blocks = [
            Settings({name: Settings(part) for name, part in block.items()}) for block in self.block_configs or []
        ]
        self.block_configs = blocks or None
        if blocks and len(blocks) != self.num_hidden_layers:
            raise ValueError(
                f"block_configs are of {len(blocks)} layers, num_hidden_layers says {self.num_hidden_layers}"
            )
        for number, block in enumerate(blocks):
            attention = block.get("attention", {})
            size = attention.get("n_heads_in_group")
            if not isinstance(size, int) or size < 1 or self.num_attention_heads % size:
                raise ValueError(
                    f"block_configs[{number}].attention: n_heads_in_group is {size!r}, which does not divide "
                    f"{self.num_attention_heads} heads"
                )
            for part in block.values():
                if part.get("no_op") or part.get("replace_with_linear"):
                    raise ValueError(f"block_configs[{number}]: this code knows only layers of attention and MLP")
            if ffn_size(block.get("ffn", {}), self.hidden_size) not in (None, self.intermediate_size):
                raise ValueError(f"block_configs[{number}].ffn: this code knows only intermediate_size")

    @property
    def kv_heads(self) -> list[int]:
        """KV heads of each layer."""
        if not self.block_configs:
            return [int(self.num_key_value_heads or self.num_attention_heads)] * self.num_hidden_layers
        return [self.num_attention_heads // block.attention.n_heads_in_group for block in self.block_configs]

    @property
    def per_layer_config(self) -> Any:
        """The configuration of each layer, of which transformers sizes its caches."""
        layers = Layers()
        layers.whole = self
        for heads in self.kv_heads:
            layer = copy.copy(self)
            layer.num_key_value_heads = heads
            layers.append(layer)
        return layers

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        raise ValueError("per_layer_config: this configuration's layers are its block_configs")


def _early_init(self: Any, *args: Any, block_configs: Any = None, **settings: Any) -> None:
    LlamaConfig.__init__(self, *args, **settings)
    self.block_configs = block_configs
    self.read_blocks()


if not dataclasses.is_dataclass(LlamaConfig):  # the first releases of transformers 5, which call no __post_init__
    DeciLMConfig.__init__ = _early_init  # type: ignore[method-assign]


def ffn_size(ffn: Any, width: int) -> Any:
    """The intermediate size that a block's `ffn` states, as engines compute it; None where it states none."""
    if ffn.get("ffn_mult") is None:
        stated: int | None = ffn.get("intermediate_size")
        return stated
    size = int(2 * ffn["ffn_mult"] * width / 3)
    return -(-size // 256) * 256


def narrow(model: Any) -> None:
    """Give the attention of each layer as many KV heads as the configuration says."""
    for layer, heads in zip(getattr(model, "model", model).layers, model.config.kv_heads, strict=True):
        attention = layer.self_attn
        rows = heads * attention.head_dim
        for linear in (attention.k_proj, attention.v_proj):
            linear.out_features = rows
            linear.weight = nn.Parameter(linear.weight[:rows].detach().clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[:rows].detach().clone())
        attention.num_key_value_groups = model.config.num_attention_heads // heads


class DeciLMModel(LlamaModel):
    """LlamaModel with the KV heads of each layer."""

    config_class = DeciLMConfig
    _auto_class = "AutoModel"

    def __init__(self, config):  # type: ignore[no-untyped-def]  # engines evaluate annotations elsewhere
        super().__init__(config)
        narrow(self)


class DeciLMForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with the KV heads of each layer."""

    config_class = DeciLMConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config):  # type: ignore[no-untyped-def]  # as above
        super().__init__(config)
        narrow(self)
