"""Every call into transformers that converting needs, the few that are not public API included.

Nothing else in the package imports transformers' internals, so a new release is met in this one file. Where the
private renaming of checkpoint keys is missing or has moved, keys that already are module names still work.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.files import MAX_RECORD_BYTES, read_object
from gqa_convert.console import talking
from gqa_convert.errors import CheckpointError, GQAConvertError, HubError, UnsupportedModelError
from gqa_convert.modeling import shipping, uneven

if TYPE_CHECKING:
    from torch import nn

# The Auto mappings whose models decode with a KV cache, in the order in which a missing `architectures` is resolved.
MODEL_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING_NAMES",
)


def version() -> str:
    """Return the installed transformers version."""
    import transformers

    return str(transformers.__version__)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice to model authors and its progress bars while a model is built or loaded."""
    from transformers.utils import logging as transformers_logging

    if talking().verbose:
        yield
        return
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = bool(transformers_logging.is_progress_bar_enabled())
    logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Read a checkpoint's configuration the way `from_pretrained` will.

    Raises:
        CheckpointError: if transformers cannot make sense of config.json.
        UnsupportedModelError: if the model type is unknown, or needs the user's word to run remote code.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            if uneven.is_uneven(_raw_config(folder)):
                return uneven.config_class().from_pretrained(folder, local_files_only=True)
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise _config_error(folder, error) from error


def _raw_config(folder: Path) -> Mapping[str, Any]:
    """config.json as parsed; empty where it cannot be, which transformers then says."""
    try:
        return read_object(folder / "config.json", MAX_RECORD_BYTES)
    except (GQAConvertError, OSError):
        return {}


def view_config(values: Mapping[str, Any]) -> Any:
    """Return the configuration of a checkpoint of a stock family from the contents of its config.json."""
    from transformers import AutoConfig

    return config_from_dict(AutoConfig.for_model(values["model_type"]), values)


def _config_error(folder: Path, error: Exception) -> GQAConvertError:
    text = " ".join(str(error).split())
    where = f"{folder / 'config.json'}"
    if isinstance(error, OSError) and "connect" in text:
        return HubError(
            f"{where}: its auto_map names code of another repository, which is not in the cache and cannot be fetched "
            f"({text[:160]})."
        )
    if "trust_remote_code" in text:
        return UnsupportedModelError(
            f"{where}: this model brings its own code. Read it, then pass --trust-remote-code to run it."
        )
    if "model_type" in text or "does not recognize" in text or "Unrecognized" in text:
        return UnsupportedModelError(
            f"{where}: transformers {version()} does not know this model type. "
            "Install a release that does, or check `model_type`."
        )
    return CheckpointError(f"{where}: transformers {version()} refuses this configuration: {text[:300]}")


def config_from_dict(like: Any, values: Mapping[str, Any]) -> Any:
    """Build a configuration of `like`'s class from the contents of a config.json."""
    cls = type(like)
    plain = deepcopy(dict(values))
    decode = getattr(cls, "_decode_special_floats", None)  # infinity is stored as {"__float__": "Infinity"}
    with quiet():
        return cls.from_dict(decode(plain) if decode is not None else plain)


def model_class(config: Any, *, folder: Path, trust_remote_code: bool) -> type[nn.Module]:
    """Return a checkpoint's class: its own code where there is some and it may run, else that of `native_class`.

    Args:
        config: of the checkpoint.
        folder: of the checkpoint, with the code that it may bring along.
        trust_remote_code: the user's word that this code may run.

    Raises:
        UnsupportedModelError: if transformers has no generative model for the configuration, or the code fails.
        CheckpointError: if the folder lacks the code that its configuration names.
    """
    names = architectures(config)
    if shipping.is_shipped(str(config.model_type)):
        shipped: type[nn.Module] = shipping.class_named(names[0] if names else "", folder)
        return shipped
    if uneven.is_uneven(config):
        own: type[nn.Module] = uneven.model_class()
        return own
    reference = own_code(config)
    if reference and trust_remote_code:
        return _own_class(reference, folder)
    return native_class(str(config.model_type), names)


def architectures(config: Any) -> tuple[str, ...]:
    """Return the class names in a configuration's `architectures`; empty if it has none."""
    names = getattr(config, "architectures", None)
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, (list, tuple)) else ()


def native_class(model_type: str, names: Iterable[str] = ()) -> type[nn.Module]:
    """Return the first of transformers' own models that `names` has, or else the first Auto class of the model type.

    Raises:
        UnsupportedModelError: if transformers has no generative model for it.
    """
    names = tuple(names)
    for cls in map(stock_model, names):
        if cls is not None:
            return cls
    for cls in _auto_classes(model_type):
        return cls
    raise UnsupportedModelError(
        f"{model_type}: transformers {version()} has no generative model for it"
        + (f" (architectures: {', '.join(names)})." if names else ".")
    )


def stock_model(name: str) -> type[nn.Module] | None:
    """A model class of transformers by name; whatever else transformers calls by that name is none."""
    import transformers

    try:
        cls = getattr(transformers, name, None)
    except Exception:  # a class whose own requirements are not installed
        return None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if is_model and cls is not transformers.PreTrainedModel else None


def own_code(config: Any) -> str:
    """Return the class that `from_pretrained` takes from the checkpoint's own code, as `module.Class`; empty for none.

    This is what `auto_map` names for the checkpoint's architecture. The code of the package's own GQA models, which
    lies beside their weights, is none: the package has it.
    """
    entries = getattr(config, "auto_map", None)
    model_type = str(getattr(config, "model_type", ""))
    if not isinstance(entries, Mapping) or shipping.is_shipped(model_type) or uneven.is_uneven(config):
        return ""
    models = {
        auto: reference
        for auto, reference in entries.items()
        if isinstance(auto, str) and auto.startswith("AutoModel") and isinstance(reference, str)
    }
    names = architectures(config)
    for reference in models.values():
        if reference.rsplit(".", 1)[-1] in names:
            return reference
    stock = next((name for name in names if stock_model(name) is not None), "")
    for auto in sorted(models, key=lambda name: name == "AutoModel"):
        if not stock or _loads(auto, stock, model_type):
            return models[auto]
    return ""


def _loads(auto: str, name: str, model_type: str) -> bool:
    """Whether an Auto class takes the stock class `name` for a model type, or would not know the type by itself."""
    import transformers

    module = importlib.import_module("transformers.models.auto.configuration_auto")
    if model_type not in getattr(module, "CONFIG_MAPPING_NAMES", {}):
        return True
    table = getattr(getattr(getattr(transformers, auto, None), "_model_mapping", None), "_model_mapping", {})
    known = table.get(model_type, ())
    return name in ((known,) if isinstance(known, str) else known)


def _own_class(reference: str, folder: Path) -> type[nn.Module]:
    from transformers import PreTrainedModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    where = f"{folder / 'config.json'}: its auto_map names {reference}"
    try:
        with quiet():
            cls: Any = get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    except Exception as error:  # the code is anybody's
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, OSError):
            raise CheckpointError(f"{where}, which cannot be read ({text}).") from error
        raise UnsupportedModelError(f"{where}, which cannot be imported ({text}).") from error
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise UnsupportedModelError(f"{where}, which is no PreTrainedModel.")
    return cls


def _auto_classes(model_type: str) -> Iterator[type[nn.Module]]:
    import transformers

    for mapping in auto_mappings().values():
        names = mapping.get(model_type)
        if names is not None:
            name = names if isinstance(names, str) else names[0]
            yield getattr(transformers, name)


def auto_mappings() -> dict[str, Mapping[str, Any]]:
    """Return the generative Auto mappings (name -> {model type: class name}) that this release has."""
    module = importlib.import_module("transformers.models.auto.modeling_auto")
    return {name: getattr(module, name) for name in MODEL_MAPPINGS if hasattr(module, name)}


def survey() -> tuple[str, ...]:
    """Return every model type that one of the generative Auto mappings knows, sorted."""
    return tuple(sorted({model_type for mapping in auto_mappings().values() for model_type in mapping}))


def build_on_meta(cls: type[nn.Module], config: Any) -> nn.Module:
    """Instantiate a model without memory or initialisation, to read its names and shapes.

    Raises:
        UnsupportedModelError: if the model's own constructor refuses the configuration.
    """
    import torch

    own = deepcopy(config)
    try:
        with quiet(), torch.device("meta"), _no_init():
            return cls(own)
    except Exception as error:
        text = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{cls.__name__}: transformers {version()} cannot build this configuration: "
            f"{type(error).__name__}: {text[:300]}"
        ) from error


def _no_init() -> Any:
    from contextlib import nullcontext

    try:
        module = importlib.import_module("transformers.initialization")
    except ImportError:
        return nullcontext()
    guard = getattr(module, "no_init_weights", None)
    return guard() if guard is not None else nullcontext()


class KeyMap:
    """Map raw checkpoint keys to module names with transformers' own loading rules.

    transformers 5 renames keys while loading (`conversion_mapping.py`, `core_model_loading.py`): a chain of renamings,
    then at most one converter that may split or merge tensors, then the base-model prefix is added or removed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.names: dict[str, Any] = dict(model.state_dict())
        self._prefix = getattr(model, "base_model_prefix", None)
        self._known: dict[str, tuple[str, ...]] = {}
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        self.exact_only = not self._load_rules()

    def _load_rules(self) -> bool:
        try:
            mapping = importlib.import_module("transformers.conversion_mapping")
            loading = importlib.import_module("transformers.core_model_loading")
            rules = mapping.get_model_conversion_mapping(self._model) or []
            self._rename = loading.rename_source_key
        except (ImportError, AttributeError):
            return False
        self._renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        return True

    def targets(self, raw_key: str) -> tuple[str, ...]:
        """Return the module names that a raw key fills: one, several (a fused tensor), or none (ignored on load)."""
        if raw_key not in self._known:
            self._known[raw_key] = self._targets(raw_key)
        return self._known[raw_key]

    def _targets(self, raw_key: str) -> tuple[str, ...]:
        if self.exact_only:
            return (raw_key,) if raw_key in self.names else ()
        name, pattern = self._rename(raw_key, self._renamings, self._converters, self._prefix, self.names)
        if name not in self.names and raw_key in self.names:
            return (raw_key,)
        if pattern is None:
            if name not in self.names:
                name, _ = self._rename(raw_key, [], [], self._prefix, self.names)
            return (name,) if name in self.names else ()
        return self._converted(name, pattern)

    def _converted(self, name: str, pattern: str) -> tuple[str, ...]:
        converter = next(rule for rule in self._converters if pattern in rule.source_patterns)
        patterns = list(converter.target_patterns)
        names = [name] + [name.replace(patterns[0], other) for other in patterns[1:]]
        return tuple(n for n in names if n in self.names)

    def operations(self, raw_key: str) -> tuple[str, ...]:
        """Return the names of the tensor operations that loading applies to a raw key, in order."""
        if self.exact_only:
            return ()
        _, pattern = self._rename(raw_key, self._renamings, self._converters, self._prefix, self.names)
        if pattern is None:
            return ()
        converter = next(rule for rule in self._converters if pattern in rule.source_patterns)
        return tuple(type(operation).__name__ for operation in converter.operations)
