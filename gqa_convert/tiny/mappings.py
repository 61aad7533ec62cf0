"""The model types the proof surveys: every generative family of the installed transformers."""

from __future__ import annotations

# transformers' Auto mappings, the fullest model first: Llama 4 is read as image-text-to-text, BART as seq-to-seq.
MAPPINGS = (
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "TEXT_TO_WAVEFORM",
    "CAUSAL_IMAGE_MODELING",
)


def mapping_names() -> list[dict[str, str | tuple[str, ...]]]:
    """Return transformers' tables of model type to class name, in that order."""
    from transformers.models.auto import modeling_auto

    return [dict(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {})) for name in MAPPINGS]


def survey_model_types() -> list[str]:
    """Return the model types that transformers can generate with, sorted (319 in transformers 5.23)."""
    return sorted({model_type for names in mapping_names() for model_type in names})
