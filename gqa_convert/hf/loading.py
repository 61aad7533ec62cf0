"""The one way to load a configuration, a model, a tokenizer, and to know a model's context length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.config_json import stated_context
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.hf import api

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOKENIZER_FILES = "tokenizer.json, tokenizer_config.json, vocabulary"


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A checkpoint with its configuration and the user's word on the code that it brings along: read once and passed.

    Attributes:
        checkpoint: the folder as it lies there, or a view of it in another family's terms.
        config: its configuration, as transformers reads it.
        trust_remote_code: whether Python code that lies in the folder may run.
        stored: None for a checkpoint as it lies in its folder; for a view, the source that it is a view of.
        given_class: the model's class, where it is not to be found out from the configuration.
    """

    checkpoint: Checkpoint
    config: Any
    trust_remote_code: bool = False
    stored: Source | None = field(default=None, repr=False)
    given_class: Any = field(default=None, repr=False)
    _views: dict[str, Source] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, *, trust_remote_code: bool = False) -> Source:
        """Read a checkpoint folder: its headers and its configuration, no weights.

        Raises:
            CheckpointError: if something is missing, damaged, unsafe or inconsistent.
            UnsupportedModelError: if the model type is unknown, or needs the user's word to run its code.
        """
        return cls.of(Checkpoint.open(folder), trust_remote_code=trust_remote_code)

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Source:
        """Read the configuration of an open checkpoint. Raises as `open`."""
        config = api.load_config(checkpoint.folder, trust_remote_code=trust_remote_code)
        return cls(checkpoint=checkpoint, config=config, trust_remote_code=trust_remote_code)

    def viewed(self, name: str, view: Callable[[], Checkpoint]) -> Source:
        """The same model in another stock family's terms, whose code is transformers' own.

        `view` makes it when it is first asked for by that name.
        """
        if name not in self._views:
            checkpoint = view()
            self._views[name] = Source(checkpoint=checkpoint, config=api.view_config(checkpoint.config), stored=self)
        return self._views[name]

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.checkpoint.folder

    @property
    def as_stored(self) -> Source:
        """The source as it lies in its folder: itself, but for a view."""
        return self.stored or self

    @property
    def model_type(self) -> str:
        """The configuration's model type; empty if it has none."""
        return str(getattr(self.config, "model_type", ""))

    @property
    def own_code(self) -> str:
        """The checkpoint's own modelling code that `model_class` is, as `module.Class`; empty if it is not its own."""
        return api.own_code(self.config) if self.trust_remote_code else ""

    @property
    def unrun_code(self) -> str:
        """Modelling code that the checkpoint names and that was not run, as the user did not ask for it; else empty."""
        return "" if self.trust_remote_code else api.own_code(self.config)

    @cached_property
    def model_class(self) -> Any:
        """The model's class; see `gqa_convert.hf.api.model_class` for what it raises."""
        if self.given_class is not None:
            return self.given_class
        return api.model_class(self.config, folder=self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def meta_model(self) -> nn.Module:
        """The model without memory, to read its names and shapes; the same one each time, so it must not be changed.

        Raises:
            UnsupportedModelError: if the model's own constructor refuses the configuration.
        """
        return api.build_on_meta(self.model_class, self.config)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the code that stands for the model."""
        if not self.unrun_code:
            return ()
        return (
            f"own code not run: config.json's auto_map names {self.unrun_code}, and transformers' own "
            f"{self.model_class.__name__} was taken in its place; --trust-remote-code runs it",
        )

    def tokenizer(self) -> Any:
        """Load the checkpoint's tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)


def load_model(
    source: Source, *, dtype: torch.dtype | str = "auto", attention: str | None = None, device: Any = None
) -> Any:
    """Load a model whole, in evaluation mode.

    The loading is transformers' common one and not the class's own: Qwen2.5-Omni's, which reads voices too, cannot
    return what was missing.

    Args:
        source: the checkpoint, or a view of one (whose tensors are computed while loading).
        dtype: of the weights; `auto` is the checkpoint's own.
        attention: an attention implementation of transformers; by default the model's usual one.
        device: where to put it; by default it stays on the CPU.

    Raises:
        CheckpointError: if weights are missing or of another shape, or transformers cannot load them.
        UsageError: if the model refuses the attention implementation.
    """
    model = _viewed_model(source, dtype) if source.stored else _stored_model(source, dtype, attention)
    model = model.eval()
    return model if device is None else model.to(device)


def _viewed_model(source: Source, dtype: torch.dtype | str) -> Any:
    import torch

    from gqa_convert.hf.partial import whole_model

    if isinstance(dtype, str):
        own = getattr(source.config, "dtype", None) or torch.float32
        wanted: torch.dtype = getattr(torch, own) if isinstance(own, str) else own
    else:
        wanted = dtype
    return whole_model(source.checkpoint, source.model_class, source.config, dtype=wanted)


def _stored_model(source: Source, dtype: torch.dtype | str, attention: str | None) -> Any:
    import torch
    from transformers import PreTrainedModel

    load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    chosen = {} if attention is None else {"attn_implementation": attention}
    try:
        with api.quiet():
            model, info = load(
                source.model_class,
                source.folder,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told of below, by name
                local_files_only=True,
                **chosen,
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises any kind, from AttributeError to ValueError
        text = " ".join(str(error).split())[:300]
        if attention is not None and (attention in text or "attn" in text):
            raise UsageError(f"train.attention={attention!r}: {text}") from error
        raise CheckpointError(
            f"{source.folder}: transformers {api.version()} cannot load it ({type(error).__name__}: {text})."
        ) from error
    faults = {
        "missing": sorted(map(str, info.get("missing_keys") or ())),
        "mismatched": [
            f"{name} {tuple(seen)} for {tuple(expected)}"
            for name, seen, expected in sorted(info.get("mismatched_keys") or (), key=str)
        ],
    }
    for kind, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(f"{source.folder}: loading reports {kind} keys: {', '.join(keys[:3])}{more}.")
    return model


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint folder's tokenizer.

    Raises:
        CheckpointError: if it has none that transformers can read.
    """
    from transformers import AutoTokenizer

    advice = f"Put the original model's tokenizer files ({_TOKENIZER_FILES}) beside the weights."
    try:
        with api.quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            size = len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab())
    except Exception as error:  # every tokenizer library has its own
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{folder}: no tokenizer could be loaded from it ({text}). {advice}") from error
    if size < 1:  # transformers makes some families an empty tokenizer where there are no files
        raise CheckpointError(f"{folder}: no tokenizer could be loaded from it (its vocabulary is empty). {advice}")
    return tokenizer


def load_feature_extractor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load what turns a sound into the features that a checkpoint's model reads.

    Raises:
        CheckpointError: if the folder has none that transformers can read.
    """
    from transformers import AutoFeatureExtractor

    try:
        with api.quiet():
            return AutoFeatureExtractor.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # OSError, ValueError, ImportError of a library that one needs
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"{folder}: no feature extractor could be loaded from it ({text}). Put the original model's "
            "preprocessor_config.json beside the weights."
        ) from error


def max_positions(config: Any) -> int | None:
    """The model's context in tokens; None where its configuration states none."""
    text = config.get_text_config(decoder=True)
    return stated_context(lambda name: getattr(text, name, None))


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: if the device does not exist here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not available here ({str(error).splitlines()[0]}).") from error
    return chosen


def pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The dtype to run a model in: one of `gqa_convert.checkpoint.dtypes.FLOAT_NAMES`, or `auto`.

    `auto` is the checkpoint's own on a GPU (returned as `auto`), float32 elsewhere.

    Raises:
        UsageError: if there is no such dtype.
    """
    import torch

    from gqa_convert.checkpoint.dtypes import named_float

    if name == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    return named_float(name)
