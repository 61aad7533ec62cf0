"""Registers the GQA classes of one family with transformers' Auto classes."""

from __future__ import annotations

from gqa_convert.modeling import shipping

_AUTO = {
    "MODEL": "AutoModel",
    "MODEL_FOR_CAUSAL_LM": "AutoModelForCausalLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ": "AutoModelForSpeechSeq2Seq",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "MODEL_FOR_MULTIMODAL_LM": "AutoModelForMultimodalLM",
    "MODEL_FOR_TEXT_TO_WAVEFORM": "AutoModelForTextToWaveform",
}


def register(model_type: str) -> bool:
    """Make the Auto classes know a model type of the shipped file; False if it is none."""
    if not shipping.is_shipped(model_type):
        return False
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    native_type = model_type.removeprefix(shipping.TYPE_PREFIX)
    config_class = shipping.grouped_class(CONFIG_MAPPING[native_type])
    transformers.AutoConfig.register(model_type, config_class, exist_ok=True)
    for table, auto in _AUTO.items():
        names = getattr(modeling_auto, f"{table}_MAPPING_NAMES", {}).get(native_type)
        name = names if isinstance(names, str) or names is None else names[0]
        native = getattr(transformers, name, None) if name else None
        if native is not None:
            getattr(transformers, auto).register(config_class, shipping.grouped_class(native), exist_ok=True)
    return True
