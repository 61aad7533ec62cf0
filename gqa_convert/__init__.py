"""Convert multi-head-attention checkpoints to grouped-query attention.

    from gqa_convert import convert

    convert("my-model", groups=8)  # writes my-model-gqa8

Heavy imports happen on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling import auto

if TYPE_CHECKING:
    from gqa_convert.conversion.execute import ConvertResult, convert, execute
    from gqa_convert.conversion.plan import ConvertPlan, plan
    from gqa_convert.errors import GQAConvertError
    from gqa_convert.heads import Grouping, HeadLayout

__version__ = "0.1.0"

_HOMES = {
    "ConvertPlan": "gqa_convert.conversion.plan",
    "ConvertResult": "gqa_convert.conversion.execute",
    "GQAConvertError": "gqa_convert.errors",
    "Grouping": "gqa_convert.heads",
    "HeadLayout": "gqa_convert.heads",
    "convert": "gqa_convert.conversion.execute",
    "execute": "gqa_convert.conversion.execute",
    "plan": "gqa_convert.conversion.plan",
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


auto.install()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
