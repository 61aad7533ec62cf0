"""Where a converted model runs: what the engine checks found, family by family, as plans, cards and docs say it.

`engines.json` is written by `scripts/clients/engine_tables.py` from the results of `scripts/clients/run.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gqa_convert.modeling.shipping import TYPE_PREFIX

_AS_LISTED = {
    "refused": "refused there, unlike the source",
    "refused_source_too": "refused there, as the source is",
    "unlike_source": "as wrong there as the source is",
}
FILE = Path(__file__).with_name("engines.json")


@cache
def summary() -> Mapping[str, Any]:
    """What was checked: `families` by `source>written` model types, each with what is right, refused, wrong, ..."""
    values: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return values


def where_it_runs(source_type: str, written_type: str) -> tuple[str, ...]:
    """Say in which engines a converted model was seen to compute what it should, and in which not.

    Args:
        source_type: the model type of the checkpoint that is converted.
        written_type: the model type that the result's config.json names.

    Returns:
        Sentences, the one that warns of silent errors first; none for families that were not checked.
    """
    seen = summary()["families"].get(f"{source_type.removeprefix(TYPE_PREFIX)}>{written_type}")
    if seen is None:
        return ()
    notes = []
    if seen["wrong"]:
        notes.append("WRONG, without a word, in " + "; ".join(f"{name} ({why})" for name, why in seen["wrong"].items()))
    if seen["right"]:
        notes.append("checked, right: " + ", ".join(seen["right"]))
    if seen["mended"]:
        notes.append("right after one step: " + "; ".join(f"{name} ({how})" for name, how in seen["mended"].items()))
    for kind, words in _AS_LISTED.items():
        if seen[kind]:
            notes.append(f"{words}: {', '.join(seen[kind])}")
    return tuple(notes)
