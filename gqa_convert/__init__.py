"""Convert multi-head-attention checkpoints to grouped-query attention.

    import gqa_convert

    gqa_convert.convert("my-model", groups=8)  # writes my-model-gqa8
    gqa_convert.convert(model, groups=8, preset="best", calibrate="texts.jsonl")  # a live model gives a live model
    gqa_convert.evaluate("my-model", "my-model-gqa8", data="held-out.jsonl").to_pandas()

Heavy imports happen on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gqa_convert.modeling import auto

if TYPE_CHECKING:
    from gqa_convert.conversion.execute import ConvertResult, execute
    from gqa_convert.conversion.plan import ConvertPlan, plan
    from gqa_convert.conversion.recipe import Recipe
    from gqa_convert.errors import GQAConvertError
    from gqa_convert.heads import Grouping, HeadLayout
    from gqa_convert.interface import bench, convert, evaluate, heal, inspect, report, sweep, uptrain, verify

__version__ = "0.1.0"

_INTERFACE = ("bench", "convert", "evaluate", "heal", "inspect", "report", "sweep", "uptrain", "verify")
_HOMES = {
    "ConvertPlan": "gqa_convert.conversion.plan",
    "ConvertResult": "gqa_convert.conversion.execute",
    "GQAConvertError": "gqa_convert.errors",
    "Grouping": "gqa_convert.heads",
    "HeadLayout": "gqa_convert.heads",
    "Recipe": "gqa_convert.conversion.recipe",
    "execute": "gqa_convert.conversion.execute",
    "plan": "gqa_convert.conversion.plan",
    **dict.fromkeys(_INTERFACE, "gqa_convert.interface"),
}

__all__ = [
    "ConvertPlan",
    "ConvertResult",
    "GQAConvertError",
    "Grouping",
    "HeadLayout",
    "Recipe",
    "__version__",
    "bench",
    "convert",
    "evaluate",
    "execute",
    "heal",
    "inspect",
    "plan",
    "report",
    "sweep",
    "uptrain",
    "verify",
]


auto.install()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
