"""What a checkpoint is, and whether a converted one is what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.anatomy import read_fields
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.provenance import PROVENANCE, read_provenance
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.compare import compare_tensors
from gqa_convert.conversion.plan import plan_source
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.conversion.recorded import read_record, recorded_plan
from gqa_convert.conversion.routes import routed
from gqa_convert.conversion.verify import verify_logits, verify_structure
from gqa_convert.errors import GQAConvertError, VerificationError
from gqa_convert.heads import HeadLayout
from gqa_convert.hf.loading import Source
from gqa_convert.modeling import shipping
from gqa_convert.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Inspection(Outcome):
    """A checkpoint's head layout and what each legal group count would cost.

    `becomes` says what converting writes, and why, where that is of another family. `cache` holds (groups, KV-cache
    bytes per token or None where refused, the reason of a refusal). `slow` says that fewer KV heads make the cache
    smaller and decoding no faster, so that converting takes `--allow-slow`. `notes` say what code was not run.
    """

    source: Path
    model_type: str
    class_name: str
    layout: HeadLayout
    parameters: int
    bytes: int
    cache: tuple[tuple[int, int | None, str], ...]
    converted_from: str
    becomes: str = ""
    slow: bool = False
    notes: tuple[str, ...] = ()

    @property
    def legal_groups(self) -> tuple[int, ...]:
        """Group counts that can be converted to, the present one included."""
        return tuple(groups for groups, cost, _ in self.cache if cost is not None)

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        return {
            "source": str(self.source),
            "model_type": self.model_type,
            "class": self.class_name,
            "becomes": self.becomes,
            "slow": self.slow,
            "notes": list(self.notes),
            "kind": self.layout.kind,
            "query_heads": self.layout.num_query_heads,
            "kv_heads": self.layout.num_kv_heads,
            "kv_heads_per_layer": list(self.layout.per_layer) or None,
            "head_dim": self.layout.head_dim,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "legal_groups": list(self.legal_groups),
            "kv_cache_bytes_per_token": {str(groups): cost for groups, cost, _ in self.cache if cost is not None},
            "refused_groups": {str(groups): reason for groups, cost, reason in self.cache if cost is None},
            "converted_by": self.converted_from,
        }


def inspect(model: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Inspection:
    """Describe a checkpoint without reading its weights.

    Raises:
        GQAConvertError: if it cannot be read, or is of a family that has no KV heads to merge.
    """
    folder = resolve_model(str(model), revision=revision)
    source = Source.open(folder, trust_remote_code=trust_remote_code)
    way = routed(source)
    main = read_fields(way.source)[0]
    smaller: list[tuple[int, int | None, str]] = []
    cache_now = None
    for groups in HeadLayout(num_query_heads=main.query_heads, num_kv_heads=main.kv_heads, head_dim=1).legal_groups:
        if groups == main.kv_heads:
            continue
        try:
            at = plan_source(source, groups=groups, target=folder, recipe=Recipe(), allow_slow=True)
        except GQAConvertError as error:
            smaller.append((groups, None, str(error)))
        else:
            smaller.append((groups, at.kv_cache_bytes_per_token_after, ""))
            cache_now = cache_now or at.kv_cache_bytes_per_token_before
    now = plan_source(source, groups=main.kv_heads, target=folder, recipe=Recipe(), cache_now=cache_now or 0)
    cache = [*smaller, (main.kv_heads, now.kv_cache_bytes_per_token_after, "")]
    tool = read_provenance(folder).get("tool", {})
    return Inspection(
        source=folder,
        model_type=now.model_type,
        class_name=now.class_name,
        layout=now.layout_before,
        parameters=now.parameters_in,
        bytes=now.bytes_in,
        cache=tuple(cache),
        becomes=way.becomes,
        notes=source.notes,
        slow=shipping.is_slow(now.model_type),
        converted_from=" ".join(str(value) for value in tool.values()),
    )


def verify_pair(
    source: str | Path,
    converted: Path,
    *,
    logits: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Check a converted folder against its source, by the recipe that its own record tells of.

    Keys, shapes and configuration must be those of the conversion. Copied tensors must be the source's byte for byte,
    pooled and rewritten ones equal to the same computed again. Of what was solved, or trained since, the bytes must
    have the digest that the record holds. Without any record, tensors that are not those of a conversion by mean are
    listed as `differing`.

    Returns:
        Counts of tensors by what they are and by how that was told (see `Comparison`), and what `logits` adds.

    Raises:
        VerificationError: if keys, shapes, configuration or logits are wrong, or a tensor is not what the folder's
            record makes of it.
        GQAConvertError: if either folder cannot be read.
    """
    record = read_record(converted)
    original = resolve_model(str(source), revision=revision)
    planned = recorded_plan(original, converted, record, trust_remote_code=trust_remote_code)
    checks = verify_structure(planned, converted, trained=record.trained)
    comparison = compare_tensors(planned, Checkpoint.open(converted), record)
    if comparison.damaged:
        raise VerificationError(
            f"{converted}: {_first(comparison.damaged)} is not what {PROVENANCE} recorded, or not finite."
        )
    if comparison.differing and record.known:
        raise VerificationError(
            f"{converted}: {_first(comparison.differing)} is not what converting {planned.source} by {planned.method} "
            "gives."
        )
    checks |= comparison.to_json()
    if logits:
        checks |= verify_logits(planned, converted, trained=record.trained, device=device, dtype=dtype)
    return checks


def _first(keys: list[str]) -> str:
    return keys[0] + (f" (the first of {len(keys)} such tensors)" if len(keys) > 1 else "")
