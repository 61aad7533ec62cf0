"""Tiny random models and the inputs that a text-only forward pass needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gqa_convert.errors import UnsupportedModelError
from gqa_convert.hf import api
from gqa_convert.modeling import shipping, uneven
from gqa_convert.tiny.mappings import mapping_names
from gqa_convert.tiny.sizes import TEXT_IDS
from gqa_convert.tiny.unusual import UNUSUAL

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST_TEXT_ID = 4  # below lie padding, begin, end and unknown
ENCODER_LENGTH = 6


def model_class(config: Any, architectures: list[str] | None = None) -> Any:
    """Return the class that `architectures` (or the config's own) names, else the fullest generative class of its type.

    Raises:
        UnsupportedModelError: if transformers has no generative class for the model type.
    """
    names = architectures or api.architectures(config)
    if names and shipping.is_shipped(config.model_type):
        return shipping.class_named(names[0])
    if uneven.is_uneven(config):
        return uneven.model_class()
    for name in names:
        named = api.stock_model(name)
        if named is not None:
            return named
    native = config.model_type.removeprefix(shipping.TYPE_PREFIX)
    for table in mapping_names():
        entry = table.get(native)
        if entry is not None:
            fullest: Any = api.stock_model(entry if isinstance(entry, str) else entry[0])
            return fullest if native == config.model_type else shipping.grouped_class(fullest)
    raise UnsupportedModelError(
        f"{config.model_type}: transformers {api.version()} has no class that generates with it."
    )


def tiny_model(config: Any, seed: int = 0, architectures: list[str] | None = None, *, cls: Any = None) -> Any:
    """Return a `PreTrainedModel` of `config` in float32 and eval mode, its random weights far from any special value.

    Its class is `cls`, such as a checkpoint's own code, or else transformers' (`model_class`).

    Freshly initialised models hide mistakes: norms are all ones, biases zero, attention nearly uniform. Here matrices
    keep the scale of their input and every vector is moved away from its initial value.
    """
    import torch

    with _seeded(seed):
        model = (cls or model_class(config, architectures))(config).float().eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                _randomise(name.rsplit(".", 1)[-1], parameter)
        model.tie_weights()
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _randomise(leaf: str, parameter: nn.Parameter) -> None:
    import torch

    noise = torch.randn_like(parameter)
    if parameter.dim() < 2 or leaf in ("A_log", "D", "dt_bias", "conv_weights"):
        parameter.add_(0.2 * noise)
    elif parameter.dim() == 2:
        parameter.copy_(noise / math.sqrt(min(parameter.shape)))
    else:  # experts (expert, out, in) and convolutions (out, in, kernel ...)
        parameter.copy_(noise / math.sqrt(max(1, math.prod(parameter.shape[1:]) // parameter.shape[1])))


def text_inputs(
    model: Any, batch: int = 2, length: int = 12, seed: int = 0, vocabulary: int = TEXT_IDS
) -> dict[str, Tensor]:
    """Return the arguments of a text-only forward pass over `length` positions of the decoder.

    Decoders with a text encoder get both id sequences; those that listen get random encoder features. Ids are drawn
    below `vocabulary`.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if config.model_type in UNUSUAL:
        return UNUSUAL[config.model_type].inputs(model, batch, length, generator)

    def ids(*shape: int) -> Tensor:
        return torch.randint(FIRST_TEXT_ID, max(vocabulary, FIRST_TEXT_ID + 1), shape, generator=generator)

    channels = _code_channels(config)
    shape = (batch, length, *channels)
    if not config.is_encoder_decoder:
        inputs = {"input_ids": ids(*shape)}
        if config.model_type == "paligemma":  # all of it suffix: a prefix would be read in both directions
            inputs["token_type_ids"] = torch.ones(batch, length, dtype=torch.long)
        return inputs
    if model.main_input_name == "input_ids" and not channels:
        inputs = {"input_ids": ids(batch, ENCODER_LENGTH), "decoder_input_ids": ids(*shape)}
        if config.model_type.endswith("udop"):  # where on the page each token stands
            inputs["bbox"] = torch.rand(batch, ENCODER_LENGTH, 4, generator=generator)
        return inputs
    features = torch.randn(batch, ENCODER_LENGTH, encoder_width(config), generator=generator)
    return {"encoder_hidden": features, "decoder_input_ids": ids(*shape)}


def heard_inputs(model: Any, seed: int = 0, batch: int = 2, length: int = 12) -> dict[str, Tensor] | None:
    """Return random features of sound with decoder ids, for a Whisper; None for models that take something else."""
    import torch

    config = model.config
    bins, positions = (getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if model.main_input_name != "input_features" or not bins or not positions:
        return None
    ids = text_inputs(model, batch, length, seed)["decoder_input_ids"]
    generator = torch.Generator().manual_seed(seed)
    return {"input_features": torch.randn(batch, bins, 2 * positions, generator=generator), "decoder_input_ids": ids}


def _code_channels(config: Any) -> tuple[int, ...]:
    """Return the trailing axes of the decoder's ids: some speech models read several codes a step."""
    if config.model_type == "dia":
        return (config.decoder_config.num_channels,)
    if config.model_type == "csm":
        return (config.num_codebooks,)
    if config.model_type == "kyutai_speech_to_text":
        return (config.num_codebooks + 1,)
    return ()


def encoder_width(config: Any) -> int:
    """Return the width of what the encoder hands to the decoder."""
    for name in ("encoder_config", "encoder", "audio_config"):
        nested = getattr(config, name, None)
        if nested is not None and hasattr(nested, "hidden_size"):
            return int(nested.hidden_size)
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "hidden_size", 0) or text.d_model)
