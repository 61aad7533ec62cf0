"""Convert multi-head-attention checkpoints to grouped-query attention.

    from gqa_convert import convert

    convert("my-model", groups=8)  # writes my-model-gqa8

Heavy imports happen on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gqa_convert import registration

if TYPE_CHECKING:
    from gqa_convert.conversion import ConvertResult, convert, execute
    from gqa_convert.errors import GQAConvertError
    from gqa_convert.heads import Grouping, HeadLayout
    from gqa_convert.planning import ConvertPlan, plan

__version__ = "0.1.0"

_HOMES = {
    "ConvertPlan": "gqa_convert.planning",
    "ConvertResult": "gqa_convert.conversion",
    "GQAConvertError": "gqa_convert.errors",
    "Grouping": "gqa_convert.heads",
    "HeadLayout": "gqa_convert.heads",
    "convert": "gqa_convert.conversion",
    "execute": "gqa_convert.conversion",
    "plan": "gqa_convert.planning",
}

__all__ = [
    "ConvertPlan",
    "ConvertResult",
    "GQAConvertError",
    "Grouping",
    "HeadLayout",
    "__version__",
    "convert",
    "execute",
    "plan",
]


registration.install()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
