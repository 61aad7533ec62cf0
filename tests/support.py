"""What running a command gave, what a folder held, and what a stock loader says of one."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Finished:
    """A command that has run: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder with its hash and modification time: equal only if nothing was touched."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def script_module(file: Path) -> ModuleType:
    """A script as a module, under its own name, which dataclasses look up."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def load_with_info(folder: Path, loader: Any = None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model that stock transformers loads (as `AutoModelForCausalLM`, or by `loader`), and what it says it missed."""
    import transformers

    loader = loader or transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, output_loading_info=True, **settings)
    return model, info
