"""Lets transformers' Auto classes load converted models of the shipped kind without `trust_remote_code`.

Importing the package imports neither torch nor transformers: the Auto classes are told when they are imported, and each
family's classes are made when a model of it is first asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
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
        made: bool = import_module("gqa_convert.modeling.registering").register(model_type)
        return made


def _offer(configuration_auto: Any) -> None:
    mapping = getattr(configuration_auto, "CONFIG_MAPPING", None)
    known = getattr(mapping, "_extra_content", None)
    if mapping is not None and isinstance(known, dict) and not isinstance(known, _OnDemand):
        mapping._extra_content = _OnDemand(known)
