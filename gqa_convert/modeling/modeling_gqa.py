"""Grouped-query attention for model families to which transformers gives no setting for the number of KV heads.

This one file lies beside the weights of a converted model and needs nothing but torch and transformers. `GQA` before
the name of a class of transformers (`GQAT5ForConditionalGeneration`, `GQAT5Config`, ...) names a subclass, made when it
is asked for, whose decoder has `config.num_key_value_heads` KV heads in its self-attention and
`config.cross_num_key_value_heads` in its cross-attention; None means as many as there are query heads, and a list has a
number for each layer. Encoders keep theirs. Only key and value projections are narrower. The forward passes are
transformers' own: they read the number of KV heads off the tensors, and the attention functions (sdpa, flash, flex)
share them out by `num_key_value_groups`. The eager functions of these families do not, so they are given repeated
heads.

Some forward passes insist on as many KV heads as query heads (`SPREAD`), and in early releases of transformers 5 those
of T5 and its like, which compute attention by themselves. There the projections repeat the heads of new tokens, and the
cache that the forward pass is handed drops the copies before it stores and returns them. Where such a pass computes
attention by itself, the cache returns copies: it is as small, but decoding is no faster.

Written by gqa-convert. Licence: Apache-2.0.
"""

import copy
import inspect
import types
from typing import Any

import torch
import transformers
from torch import nn

MINIMUM = 5  # the release of transformers whose classes this file stands on; tried: 5.0, 5.10, 5.23

if int(transformers.__version__.partition(".")[0]) < MINIMUM:
    raise ImportError(
        f"This model's own code needs transformers {MINIMUM} or later; this is {transformers.__version__}. "
        "pip install -U transformers"
    )
try:
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, conversion_mapping
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto import modeling_auto
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(
        f"This model's own code finds {error.name or 'a module'} changed in transformers {transformers.__version__}: "
        f"it was written against 5.23 and tried from {MINIMUM}.0 on."
    ) from error

PREFIX = "GQA"
TYPE_PREFIX = "gqa_"
SELF_FIELD = "num_key_value_heads"
CROSS_FIELD = "cross_num_key_value_heads"

# How families spell the key and value projections, the number of query heads, and a cross-attention module.
PROJECTIONS = (("k_proj", "v_proj"), ("k", "v"), ("key", "value"), ("Wk", "Wv"))
HEADS = ("num_heads", "n_heads", "num_attention_heads")
SHARING = "gqa_query_heads"  # of a module whose own count was lowered
CROSS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attention", "encoder_decoder_attention")

# Where the decoder of a composite model lies; for the others see `_in_decoder`.
DECODERS = {
    "florence2": "model.language_model.decoder.",
    "kosmos-2": "text_model.",
    "kosmos-2.5": "text_model.",
    "seamless_m4t": "text_decoder.",
    "seamless_m4t_v2": "text_decoder.",
}

# Families whose forward pass needs as many keys as query heads, with the order of rows of a fused projection: [q k v]
# head by head, or all q, all k, all v.
SPREAD = {
    "bloom": "per_head",
    "gpt_neo": "",
    "gpt_neox_japanese": "per_head",
    "megatron-bert": "",
    "mpt": "concat",
    "opt": "",
    "persimmon": "per_head",
    "rembert": "",
    "roformer": "",
    "umt5": "",
    "xglm": "",
}
FUSED = ("query_key_value", "Wqkv")
CACHES = ("past_key_values", "layer_past")

# Attention modules whose forward pass splits keys by this attribute, and queries not by it.
KEY_HEADS = {"whisper": "num_heads"}

# Families whose `generate` starts with just the ids it is given (a prompt), which transformers tells by model type.
OWN_START = ("whisper",)


def decoder_attention(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the attention modules of a model's decoder by their paths."""
    return {
        name: module
        for name, module in model.named_modules()
        if (_projections(module) or _is_fused(module)) and _in_decoder(model.config, name, module)
    }


def is_cross(path: str, module: nn.Module) -> bool:
    """Tell by its path (or its own word) whether an attention module reads the encoder's output."""
    return bool(getattr(module, "is_cross_attention", False)) or any(part in CROSS for part in path.split("."))


def query_heads(module: nn.Module) -> int:
    """Return the number of query heads of an attention module."""
    return next(int(getattr(module, name)) for name in (SHARING, *HEADS) if hasattr(module, name))


def share_kv_heads(model: PreTrainedModel) -> None:
    """Give the decoder's attention as many KV heads as the configuration says.

    Raises:
        ValueError: if the model has no decoder attention, or its heads cannot share that many KV heads.
    """
    modules = decoder_attention(model)
    if not modules:
        raise ValueError(f"{type(model).__name__}: it has no decoder whose attention could share KV heads.")
    for path, module in modules.items():
        field = CROSS_FIELD if is_cross(path, module) else SELF_FIELD
        heads, groups = query_heads(module), getattr(model.config, field, None)
        if isinstance(groups, (list, tuple)):
            groups = _of_layer(groups, path, field)
        if groups is None or groups == heads:
            continue
        if groups < 1 or heads % groups:
            raise ValueError(f"{path}: {heads} query heads cannot share {groups} KV heads ({field}).")
        _share(module, heads, groups, _native_type(model.config))


def layer_number(path: str) -> int:
    """Return the number of the decoder layer that an attention module lies in."""
    return int(next(part for part in path.split(".") if part.isdigit()))


def _of_layer(counts: Any, path: str, field: str) -> int:
    number = layer_number(path)
    if number >= len(counts):
        raise ValueError(f"{path}: {field} names the KV heads of {len(counts)} layers only.")
    return int(counts[number])


def _share(module: Any, heads: int, groups: int, native_type: str) -> None:
    spread = native_type in SPREAD or not (_calls_functions(type(module)) or _is_fused(module))
    if _is_fused(module):
        _narrow_fused(module, heads, groups)
    for name in _projections(module):
        _narrow(getattr(module, name), heads, groups, fused=name in FUSED)
        if spread:
            _spread(getattr(module, name), heads, groups, SPREAD.get(native_type, "") if name in FUSED else "")
    module.num_key_value_groups = heads // groups
    if native_type in KEY_HEADS:
        setattr(module, SHARING, heads)
        setattr(module, KEY_HEADS[native_type], groups)
    module.__class__ = _grouped_class(type(module), folded=spread)


def _calls_functions(native: type[nn.Module]) -> bool:
    """Tell whether a forward pass leaves attention to transformers' functions: T5's did not in 5.0 and 5.10."""
    return "eager_attention_forward" in native.forward.__globals__


def _in_decoder(config: PreTrainedConfig, path: str, module: nn.Module) -> bool:
    where = DECODERS.get(_native_type(config))
    if where is not None:
        return path.startswith(where)
    if config.is_encoder_decoder:
        return "decoder" in path.split(".")
    return getattr(module, "is_decoder", True) is not False


def _projections(module: nn.Module) -> tuple[str, ...]:
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return names
    return tuple(name for name in FUSED if isinstance(getattr(module, name, None), nn.Linear))


def _is_fused(module: nn.Module) -> bool:
    return isinstance(getattr(module, "c_attn", None), Conv1D)


def _narrow(linear: Any, heads: int, groups: int, fused: bool = False) -> None:
    """Keep the rows of `groups` heads; which does not matter, as weights are loaded afterwards.

    A fused projection becomes [q | k | v].
    """
    rows = linear.out_features // (3 * heads) * (heads + 2 * groups) if fused else linear.out_features // heads * groups
    linear.out_features = rows
    linear.weight = nn.Parameter(linear.weight[:rows].detach().clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[:rows].detach().clone())


def _narrow_fused(module: Any, heads: int, groups: int) -> None:
    """GPT-2's [q | k | v], or [k | v] across: a Conv1D of (in, out)."""
    full = module.split_size
    part = full // heads * groups
    sizes = [part, part] if module.is_cross_attention else [full, part, part]
    keep = torch.cat([torch.arange(size) + i * full for i, size in enumerate(sizes)]).to(module.c_attn.weight.device)
    module.split_size = sizes
    module.c_attn.nf = sum(sizes)
    module.c_attn.weight = nn.Parameter(module.c_attn.weight.detach()[:, keep])
    module.c_attn.bias = nn.Parameter(module.c_attn.bias.detach()[keep])


class SpreadLinear(nn.Linear):
    """A narrow projection whose output has every KV head once for each of its query heads."""

    heads: int
    groups: int
    layout: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project (..., in) to (..., out of the native projection)."""
        narrow = super().forward(input)
        if not self.layout:
            return self._repeat(narrow.unflatten(-1, (self.groups, -1))).flatten(-2)
        q, k, v = narrow.unflatten(-1, (self.heads + 2 * self.groups, -1)).split(
            [self.heads, self.groups, self.groups], dim=-2
        )
        k, v = self._repeat(k), self._repeat(v)
        if self.layout == "concat":
            return torch.cat([q, k, v], dim=-2).flatten(-2)
        return torch.stack([q, k, v], dim=-2).flatten(-3)

    def _repeat(self, states: torch.Tensor) -> torch.Tensor:
        return states.repeat_interleave(self.heads // self.groups, dim=-2)


def _spread(linear: Any, heads: int, groups: int, layout: str) -> None:
    linear.__class__ = SpreadLinear
    linear.heads, linear.groups, linear.layout = heads, groups, layout


def _copies(states: torch.Tensor, size: int) -> torch.Tensor:
    """Copies in memory of their own, also of a single head: some forward passes view them in another shape."""
    copies: torch.Tensor = repeat_kv(states, size).contiguous()
    return copies


class CopiedLayer:
    """A layer of a cache, whose keys and values are read with `size` copies of each head."""

    def __init__(self, layer: Any, size: int) -> None:
        self._layer, self._size = layer, size

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_layer"], name)
        return _copies(value, self._size) if name in ("keys", "values") else value


class FoldedCache:
    """A cache, or none, that keeps one of every `size` heads of what it is given, and returns `copies` if asked to."""

    def __init__(self, cache: Any, size: int, copies: bool) -> None:
        self._cache, self._size, self._copies = cache, size, copies

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values (batch, heads, length, width) without their copies; return all that is stored."""
        key, value = key[:, :: self._size], value[:, :: self._size]
        if self._cache is not None:
            key, value = self._cache.update(key, value, *args, **kwargs)
        return (_copies(key, self._size), _copies(value, self._size)) if self._copies else (key, value)

    @property
    def layers(self) -> Any:
        """The layers: cross-attention reads what it stored there by itself."""
        return [CopiedLayer(each, self._size) for each in self._cache.layers] if self._copies else self._cache.layers

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Return the number of positions stored."""
        return 0 if self._cache is None else self._cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


class FoldedPair(EncoderDecoderCache):
    """The same for the two caches of a decoder that listens."""

    self_attention_cache: Any
    cross_attention_cache: Any

    def __init__(self, pair: Any, size: int, copies: bool) -> None:
        self.self_attention_cache = FoldedCache(pair.self_attention_cache, size, copies)
        self.cross_attention_cache = FoldedCache(pair.cross_attention_cache, size, copies)
        self.is_updated = pair.is_updated


def _folding(forward: Any, copies: bool) -> Any:
    """Hand a forward pass its cache, or its lack of one, folded."""
    name = next(name for name in CACHES if name in inspect.signature(forward).parameters)

    def folded(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(name)
        fold: Any = FoldedPair if isinstance(cache, EncoderDecoderCache) else FoldedCache
        if cache is not None or not copies:
            kwargs[name] = fold(cache, self.num_key_value_groups, copies)
        return forward(self, *args, **kwargs)

    return folded


class _Functions:
    """Transformers' attention functions, of which sdpa is `_packing_sdpa`; early releases of version 5 index them."""

    @staticmethod
    def get_interface(name: str, default: Any) -> Any:
        return _packing(ALL_ATTENTION_FUNCTIONS.get_interface(name, default))

    def __class_getitem__(cls, name: str) -> Any:
        return _packing(ALL_ATTENTION_FUNCTIONS[name])


def _packing(function: Any) -> Any:
    if function is sdpa_attention_forward:
        return _packing_sdpa
    return function if function.__module__.startswith(("transformers.", __name__)) else _by_heads(function)


def _by_heads(function: Any) -> Any:
    """Let an engine's attention function return (batch, length, heads, width), which some forward passes count on."""

    def attend(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        output, *others = function(module, query, *args, **kwargs)
        return output.reshape(query.shape[0], query.shape[2], query.shape[1], -1), *others

    return attend


def _packing_sdpa(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Let transformers pack a decoding step's query heads onto their KV heads, as it does where there is a mask.

    Without one it asks torch to share KV heads, which on a CPU, and anywhere beside a position bias, runs as slowly as
    if every query head had its own.
    """
    if attention_mask is None and query.shape[2] == 1 and not torch.compiler.is_compiling():
        attention_mask = kwargs.pop("position_bias", None)
        if attention_mask is None and query.device.type == "cpu":
            attention_mask = query.new_zeros(1, 1, 1, key.shape[2])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _with_repeating_eager(forward: Any, eager: Any) -> Any:
    """Copy a forward pass's function, with an eager attention function that is given repeated heads."""

    def repeated(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
        return eager(module, query, key, value, *args, **kwargs)

    names = {**forward.__globals__, "eager_attention_forward": repeated, "ALL_ATTENTION_FUNCTIONS": _Functions}
    # torch.compile looks names up in the module that the globals call themselves, where these two are others.
    names.pop("__name__")
    own = types.FunctionType(forward.__code__, names, "forward", forward.__defaults__, forward.__closure__)
    own.__kwdefaults__, own.__module__ = forward.__kwdefaults__, forward.__module__
    return own


_grouped: dict[type[nn.Module], type[nn.Module]] = {}


def _grouped_class(native: type[nn.Module], folded: bool) -> type[nn.Module]:
    """Subclass an attention module: its forward is the native one with an eager function that repeats KV heads."""
    if native not in _grouped:
        eager = native.forward.__globals__.get("eager_attention_forward")
        if eager is None and not folded:
            raise ValueError(
                f"{native.__name__}: transformers {transformers.__version__} has another form of it than the one this "
                "model was converted for. Use transformers 5.23."
            )
        forward = native.forward if eager is None else _with_repeating_eager(native.forward, eager)
        space = {"forward": _folding(forward, eager is None) if folded else forward, "__module__": __name__}
        _grouped[native] = type(PREFIX + native.__name__, (native,), space)
    return _grouped[native]


def _native_type(config: PreTrainedConfig | type[PreTrainedConfig]) -> str:
    return str(config.model_type).removeprefix(TYPE_PREFIX)


def __getattr__(name: str) -> Any:
    """Make `GQA<native>` from a class of transformers."""
    native = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(native, type) or not issubclass(native, (PreTrainedConfig, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cls = _config_class(native) if issubclass(native, PreTrainedConfig) else _model_class(native)
    globals()[name] = cls
    return cls


def grouped_class(native: type) -> Any:
    """Return the `GQA` class of a native configuration or model class."""
    return globals().get(PREFIX + native.__name__) or __getattr__(PREFIX + native.__name__)


def _config_class(native: type[PreTrainedConfig]) -> type:
    space = {
        "__module__": __name__,
        "__doc__": f"{native.__name__} with a number of KV heads for the decoder's self- and cross-attention.",
        "__annotations__": {SELF_FIELD: int | list[int] | None, CROSS_FIELD: int | list[int] | None},
        SELF_FIELD: None,
        CROSS_FIELD: None,
        "model_type": TYPE_PREFIX + native.model_type,
        # Whisper's maps this name to the encoder's heads.
        "attribute_map": {name: to for name, to in (native.attribute_map or {}).items() if name != SELF_FIELD},
        "_auto_class": "AutoConfig",
        "per_layer_config": property(_per_layer, getattr(native, "per_layer_config", property()).fset),
    }
    _carry_key_names(native.model_type, TYPE_PREFIX + native.model_type)
    return type(PREFIX + native.__name__, (native,), space)


class Layers(list[Any]):
    """One configuration for each layer; transformers also asks for that of a kind of layers, which is the whole one."""

    whole: Any = None

    def __getitem__(self, index: Any) -> Any:
        return self.whole if isinstance(index, str) else super().__getitem__(index)


def _per_layer(config: Any) -> Any:
    """The configuration of each layer, of which transformers sizes its caches."""
    counts = getattr(config, SELF_FIELD, None)
    if not isinstance(counts, (list, tuple)):
        return PreTrainedConfig.per_layer_config.fget(config)  # type: ignore[attr-defined]
    layers = Layers()
    layers.whole = config
    for groups in counts:
        layer = copy.copy(config)
        setattr(layer, SELF_FIELD, groups)
        layers.append(layer)
    return layers


def _model_class(native: Any) -> type:
    def __init__(self, config, *args, **kwargs):  # type: ignore[no-untyped-def]  # engines evaluate annotations elsewhere
        native.__init__(self, config, *args, **kwargs)
        share_kv_heads(self)

    space = {
        "__module__": __name__,
        "__doc__": f"{native.__name__} whose decoder shares KV heads among its query heads.",
        "__init__": __init__,
        "config_class": grouped_class(native.config_class),
        "_auto_class": auto_class(native.__name__),
        "_keys_to_ignore_on_load_unexpected": _whole_names(native._keys_to_ignore_on_load_unexpected),
    }
    if _native_type(native.config_class) in OWN_START:
        space["_prepare_decoder_input_ids_for_generation"] = _given_start
    _carry_key_names(native.__name__, PREFIX + native.__name__)
    return type(PREFIX + native.__name__, (native,), space)


def _whole_names(patterns: Any) -> Any:
    """Let patterns begin where a part of a name does: GPT-2's for old masks, attn.bias, is in c_attn.bias too."""
    return patterns and [rf"(?:^|\.){each}" if each[:1].isalnum() else each for each in patterns]


def _given_start(self: Any, *, model_kwargs: dict[str, Any], **others: Any) -> Any:
    """Start `generate` with the decoder's ids as they are given; without any, as transformers does."""
    if "decoder_input_ids" in model_kwargs:
        return model_kwargs.pop("decoder_input_ids"), model_kwargs
    return GenerationMixin._prepare_decoder_input_ids_for_generation(self, model_kwargs=model_kwargs, **others)


def auto_class(native_name: str) -> str:
    """Return the Auto class that a native model class belongs to."""
    for mapping, auto in (
        ("CAUSAL_LM", "CausalLM"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "Seq2SeqLM"),
        ("SPEECH_SEQ_2_SEQ", "SpeechSeq2Seq"),
        ("IMAGE_TEXT_TO_TEXT", "ImageTextToText"),
        ("TEXT_TO_WAVEFORM", "TextToWaveform"),
        ("MULTIMODAL_LM", "MultimodalLM"),
    ):
        if native_name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
            return f"AutoModelFor{auto}"
    return "AutoModel"


def _carry_key_names(native: str, own: str) -> None:
    """Let old names of weights be read as for the native class: transformers looks them up by class or model type."""
    known = conversion_mapping.get_checkpoint_conversion_mapping(native)
    if known is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(own, known, overwrite=True)
