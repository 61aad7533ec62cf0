"""Packages that share their name with a function of the interface: both are `gqa_convert.evaluate`.

Python puts a package's module in the place of anything of that name once it is imported, so the module itself must do
what the function does when it is called.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        interface = import_module("gqa_convert.interface")  # the top room: no import, or it would go up
        return getattr(interface, self.__name__.rpartition(".")[2])(*args, **kwargs)


def call_through(name: str) -> None:
    """Make a package's module callable: `gqa_convert.<its last name>` of the interface is called."""
    sys.modules[name].__class__ = _CallableModule
