"""Every model type of the installed transformers: whether it converts, and what that claim rests on.

`proven` and `unproven` come from the recorded run of the contract (`python -m gqa_convert.contract.run`); the record
says with which transformers it was made. A model type that the record does not know is listed as not yet tried.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.resources import files
from typing import Any

from gqa_convert.anatomy import family_facts
from gqa_convert.hf import api
from gqa_convert.modeling import shipping
from gqa_convert.modeling.transpile.rule import rules_for

RECORD = "record.json"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type.

    `kind` is A (separate k and v projections), B (fused), C (no KV-head setting in transformers, but perhaps in a
    modelling file of ours), D (no KV heads to merge) or N (a wrapper whose nested decoder decides); `status` is proven,
    unproven, untried, refused or nested.
    """

    model_type: str
    kind: str
    status: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """The family as JSON values."""
        return asdict(self)


def record() -> dict[str, Any]:
    """Return what the recorded run of the contract showed: versions, proven names, and reasons of the others.

    Empty if there is none. The whole record, with every check, is in the repository (`scripts/contract/record.json`).
    """
    path = files("gqa_convert.contract").joinpath(RECORD)
    if not path.is_file():
        return {}
    recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return recorded


def families() -> tuple[Family, ...]:
    """Return every generative model type that the installed transformers knows, sorted by name."""
    recorded = record()
    proven, unproven = frozenset(recorded.get("proven", ())), recorded.get("unproven", {})
    version = recorded.get("versions", {}).get("transformers", "")

    def result(name: str) -> str | None:
        return "" if name in proven else unproven.get(name)

    # A release that was recorded has the recorded model types: asking it would import torch, for seconds.
    names = sorted({*proven, *unproven}) if version == metadata.version("transformers") else api.survey()
    return tuple(_family(name, result(name), version) for name in names)


def _family(model_type: str, failure: str | None, version: str) -> Family:
    """One family; `failure` says why the contract did not hold with that version ("": it held; None: never tried)."""
    refused = family_facts.refused_families().get(model_type)
    if refused is not None and not rules_for(model_type):
        status = "nested" if refused[0] == "N" else "refused"
        return Family(model_type=model_type, kind=refused[0], status=status, reason=refused[1])
    without_setting = shipping.ships(model_type) or rules_for(model_type)
    kind = "C" if without_setting else "B" if model_type in family_facts.FUSED_LAYOUTS else "A"
    if failure is None:
        return Family(model_type=model_type, kind=kind, status="untried", reason="not in the recorded run")
    if not failure:
        note = (
            family_facts.ONLY_MQA.get(model_type, "")
            or family_facts.ONLY_EVEN.get(model_type, "")
            or _route_note(model_type)
        )
        return Family(model_type=model_type, kind=kind, status="proven", reason=note or f"contract held with {version}")
    return Family(model_type=model_type, kind=kind, status="unproven", reason=failure)


def _route_note(model_type: str) -> str:
    """How a family without a setting converts: as another stock family, with shipped code, or either."""
    return "; else ".join(note for note in (_transpiled_note(model_type), _shipped_note(model_type)) if note)


def _transpiled_note(model_type: str) -> str:
    rules = rules_for(model_type)
    if not rules:
        return ""
    counts = sorted({groups for rule in rules for groups in rule.only_groups or ()})
    targets = " or ".join(dict.fromkeys(rule.target for rule in rules))
    return f"written as {targets}, no remote code" + (
        f" (only --groups {', '.join(map(str, counts))})" if counts else ""
    )


def _shipped_note(model_type: str) -> str:
    if not shipping.ships(model_type):
        return ""
    only = "only decoders (is_decoder: true); " if model_type in shipping.ENCODERS else ""
    slow = "only with --allow-slow, as the cache shrinks but decoding is no faster; "
    return (
        f"{slow if shipping.is_slow(model_type) else ''}{only}"
        f"{shipping.FILE.name} goes along: load with trust_remote_code, or after importing gqa_convert"
    )
