"""Lets transformers' Auto classes load converted models of the shipped kind without `trust_remote_code`.

Importing the package imports neither torch nor transformers: the Auto classes are told when they are imported, and each
family's classes are made when a model of it is first asked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Tell the Auto classes now if they have been imported, or else as soon as they are."""
    if _AUTO_CONFIG in sys.modules:
        _offer(sys.modules[_AUTO_CONFIG])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds one module as the other finders would, to act after it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec with a loader that tells the Auto classes; None for any other module."""
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader)
        return spec


class _Telling(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _offer(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _OnDemand(dict[str, Any]):
    """User-registered configurations by model type, which makes those of the shipped file when they are looked up."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or (isinstance(model_type, str) and self._made(model_type))

    def _made(self, model_type: str) -> bool:
        if not model_type.startswith("gqa_"):
            return False
        return register(model_type)


def _offer(configuration_auto: Any) -> None:
    """Put the lookup in the place of transformers' own, which has no public way for classes made on demand."""
    mapping = getattr(configuration_auto, "CONFIG_MAPPING", None)
    known = getattr(mapping, "_extra_content", None)
    if mapping is None or not isinstance(known, dict):
        warnings.warn(
            "gqa-convert: this version of transformers keeps registered model types in another way, so converted T5, "
            "BART, GPT-2 and their like load only with trust_remote_code=True.",
            stacklevel=2,
        )
    elif not isinstance(known, _OnDemand):
        mapping._extra_content = _OnDemand(known)


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
    from gqa_convert.modeling import shipping

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
