"""What goes along with a converted model whose modelling code is not transformers' own, and which models those are.

The code itself is `modeling_gqa.py`: it lies beside the weights and works without this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.files import MAX_RECORD_BYTES, read_object
from gqa_convert.errors import UnsupportedModelError

FILE = Path(__file__).with_name("modeling_gqa.py")
TYPE_PREFIX = "gqa_"

# Model types whose attention works with fewer KV heads once its projections are narrowed and its groups are counted:
# each was run through the contract (`gqa_convert.contract`).
_SEQUENCE_TO_SEQUENCE = [
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "florence2",
    "longt5",
    "m2m_100",
    "marian",
    "mbart",
    "mt5",
    "nllb-moe",
    "pegasus",
    "pegasus_x",
    "pix2struct",
    "plbart",
    "pop2piano",
    "pp_formulanet",
    "seamless_m4t",
    "seamless_m4t_v2",
    "speech_to_text",
    "t5",
    "udop",
    "umt5",
    "whisper",
]
_DECODERS = [
    "biogpt",
    "ctrl",
    "gpt-sw3",
    "gpt2",
    "kosmos-2.5",
    "modernbert-decoder",
    "opt",
    "persimmon",
]
_ENCODERS = [
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
_SLOW_DECODERS = [
    "bloom",
    "gpt_neo",
    "gpt_neox_japanese",
    "mpt",
    "xglm",
]
_SLOW_ENCODERS = [
    "megatron-bert",
    "rembert",
    "roformer",
]

# Of these, encoders that decode with a cache only if their configuration says `is_decoder`.
ENCODERS = frozenset(_ENCODERS) | frozenset(_SLOW_ENCODERS)

# Those whose forward pass computes attention by itself and knows no groups: it is handed every KV head once for each
# of its query heads. The cache shrinks, but decoding is no faster.
SLOW = frozenset(_SLOW_DECODERS) | frozenset(_SLOW_ENCODERS)
FAMILIES = frozenset(_SEQUENCE_TO_SEQUENCE) | frozenset(_DECODERS) | ENCODERS | SLOW


def ships(model_type: str) -> bool:
    """Tell whether a native model type becomes a GQA model by way of the shipped file."""
    return model_type in FAMILIES


def is_shipped(model_type: str) -> bool:
    """Tell whether a model type is one of the shipped file's own."""
    return model_type.startswith(TYPE_PREFIX) and model_type.removeprefix(TYPE_PREFIX) in FAMILIES


def is_slow(model_type: str) -> bool:
    """Tell whether a model type, native or of the shipped file, decodes no faster with fewer KV heads."""
    return model_type.removeprefix(TYPE_PREFIX) in SLOW


def check_faster(model_type: str) -> None:
    """Refuse a native model type that would decode no faster with fewer KV heads.

    Raises:
        UnsupportedModelError: naming the flag that allows it.
    """
    if ships(model_type) and is_slow(model_type):
        raise UnsupportedModelError(
            f"{model_type}: fewer KV heads would make its KV cache smaller but decoding no faster, as its attention in "
            "transformers knows no groups. --allow-slow converts it for the memory alone."
        )


def check_native(config: Any) -> None:
    """Refuse a model of a shipped family that decodes without a cache of keys and values.

    Raises:
        UnsupportedModelError: with the reason.
    """
    model_type = str(config.model_type)
    if model_type in ENCODERS and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{model_type} cannot become a grouped-query model here: it is an encoder, which reads all tokens at once "
            "and keeps no KV cache (config.json does not say is_decoder: true)."
        )
    if getattr(config, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError(
            f"{model_type} cannot become a grouped-query model here: reorder_and_upcast_attn computes attention in a "
            "way of its own that knows no groups. Set it to false in config.json if the model does without."
        )


def head_counts(model: Any) -> tuple[int, int | None]:
    """Return the heads of a native model's decoder: of self-attention, and of cross-attention (None: it has none).

    Raises:
        UnsupportedModelError: if it has no decoder, or its layers differ in heads.
    """
    from gqa_convert.modeling import modeling_gqa

    counts: dict[bool, set[int]] = {False: set(), True: set()}
    for path, module in modeling_gqa.decoder_attention(model).items():
        try:
            counts[modeling_gqa.is_cross(path, module)].add(modeling_gqa.query_heads(module))
        except StopIteration as error:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {path} does not say how many heads it has. Is this a class of the model type?"
            ) from error
    if not counts[False]:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot become a grouped-query model here: it has no decoder, and encoders keep no "
            "KV cache."
        )
    if any(len(values) > 1 for values in counts.values()):
        raise UnsupportedModelError(f"{type(model).__name__}: its layers differ in heads ({counts}).")
    return counts[False].pop(), counts[True].pop() if counts[True] else None


def grouped_class(native: type) -> Any:
    """Return the GQA form of a native configuration or model class."""
    from gqa_convert.modeling import modeling_gqa

    return modeling_gqa.grouped_class(native)


def class_named(name: str, folder: Path | None = None) -> Any:
    """Return the GQA model class that a converted folder's `architectures` names.

    Raises:
        UnsupportedModelError: if there is none of that name.
    """
    from transformers import PreTrainedModel

    from gqa_convert.modeling import modeling_gqa

    cls = getattr(modeling_gqa, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        where = f"{folder / 'config.json'}: " if folder else ""
        raise UnsupportedModelError(f"{where}architectures names {name!r}, which is no GQA class.")
    return cls


def field_names() -> tuple[str, str]:
    """Return the configuration's names for the KV heads of self- and of cross-attention."""
    from gqa_convert.modeling import modeling_gqa

    return modeling_gqa.SELF_FIELD, modeling_gqa.CROSS_FIELD


def config_values(config: Any, native_class: type, folder: Path | None = None) -> dict[str, Any]:
    """Return what config.json must say beside the KV heads for the shipped file to be used.

    A tokenizer that is found by its model type alone is named, as no tokenizer goes by the new one.
    """
    from gqa_convert.modeling import modeling_gqa

    grouped = grouped_class(native_class)
    module = FILE.stem
    auto_map = {"AutoConfig": f"{module}.{grouped.config_class.__name__}"}
    auto_map[modeling_gqa.auto_class(native_class.__name__)] = f"{module}.{grouped.__name__}"
    base = _base_class(str(config.model_type))
    if base:  # what AutoModel makes, which engines build on
        auto_map.setdefault("AutoModel", f"{module}.{modeling_gqa.PREFIX}{base}")
    return {
        "model_type": grouped.config_class.model_type,
        "architectures": [grouped.__name__],
        "auto_map": auto_map,
        **(_tokenizer(config, folder) if folder else {}),
    }


def _base_class(model_type: str) -> str:
    """The class without a head that AutoModel makes of a native model type; empty if there is none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    name = MODEL_MAPPING_NAMES.get(model_type, "")
    return name if isinstance(name, str) else name[0]


def is_cross(name: str) -> bool:
    """Tell by a parameter's name whether it is of attention that reads the encoder's output."""
    from gqa_convert.modeling import modeling_gqa

    return any(part in modeling_gqa.CROSS for part in name.split("."))


def decoder_layers(model: Any) -> int:
    """Return the number of layers of a model's decoder, native or of the shipped file."""
    from gqa_convert.modeling import modeling_gqa

    return 1 + max(modeling_gqa.layer_number(path) for path in modeling_gqa.decoder_attention(model))


def grouped_config(config: Any, kv_heads: int) -> Any:
    """Return a native configuration's GQA form with `kv_heads` KV heads everywhere in the decoder."""
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    own, cross = field_names()
    listens = config.is_encoder_decoder or getattr(config, "add_cross_attention", False)
    return grouped_class(type(config))(**fields, **{own: kv_heads, cross: kv_heads if listens else None})


def _tokenizer(config: Any, folder: Path) -> Mapping[str, str]:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    own = folder / "tokenizer_config.json"
    if getattr(config, "tokenizer_class", None) or not any(folder.glob("*token*")):
        return {}
    if own.is_file() and "tokenizer_class" in read_object(own, MAX_RECORD_BYTES):
        return {}
    name = TOKENIZER_MAPPING_NAMES.get(config.model_type)
    return {"tokenizer_class": name} if isinstance(name, str) else {}
