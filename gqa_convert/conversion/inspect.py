"""What a checkpoint is, and whether a converted one is what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_convert.anatomy.anatomy import read_fields
from gqa_convert.checkpoint.hub import resolve_model
from gqa_convert.checkpoint.provenance import read_provenance
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.plan import plan
from gqa_convert.conversion.routes import recorded_route, routed
from gqa_convert.conversion.verify import compare_weights, verify_logits, verify_structure
from gqa_convert.errors import GQAConvertError, VerificationError
from gqa_convert.heads import HeadLayout
from gqa_convert.modeling import shipping


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A checkpoint's head layout and what each legal group count would cost.

    `becomes` says what converting writes, and why, where that is of another family. `cache` holds (groups, KV-cache
    bytes per token or None where refused, the reason of a refusal). `slow` says that fewer KV heads make the cache
    smaller and decoding no faster, so that converting takes `--allow-slow`.
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
            "kind": self.layout.kind,
            "query_heads": self.layout.num_query_heads,
            "kv_heads": self.layout.num_kv_heads,
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
    way = routed(Checkpoint.open(folder), trust_remote_code=trust_remote_code)
    _, fields = read_fields(way.checkpoint, trust_remote_code=trust_remote_code)
    made = plan(folder, groups=fields[0].kv_heads, trust_remote_code=trust_remote_code)
    cache: list[tuple[int, int | None, str]] = []
    for groups in made.layout_before.legal_groups:
        try:
            at = plan(folder, groups=groups, allow_slow=True, trust_remote_code=trust_remote_code)
            cache.append((groups, at.kv_cache_bytes_per_token_after, ""))
        except GQAConvertError as error:
            cache.append((groups, None, str(error)))
    tool = read_provenance(folder).get("tool", {})
    return Inspection(
        source=folder,
        model_type=made.model_type,
        class_name=made.class_name,
        layout=made.layout_before,
        parameters=made.parameters_in,
        bytes=made.bytes_in,
        cache=tuple(cache),
        becomes=way.becomes,
        slow=shipping.is_slow(made.model_type),
        converted_from=" ".join(str(value) for value in tool.values()),
    )


def verify_pair(
    source: str | Path, converted: Path, *, logits: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Check a converted folder against its source.

    Keys, shapes and configuration must be those of the conversion; copied tensors must be identical byte for byte and
    merged ones equal to the merge computed again, unless the folder was trained further (then they are counted as
    differing and reported).

    Raises:
        VerificationError: if keys, shapes, configuration or logits are wrong, or a tensor differs in a folder that
            says it is a bare conversion.
        GQAConvertError: if either folder cannot be read.
    """
    target = Checkpoint.open(converted)
    _, fields = read_fields(target, trust_remote_code=trust_remote_code)
    record = read_provenance(converted)
    conversion = record.get("conversion", {})
    made = plan(
        source,
        groups=fields[0].kv_heads,
        cross_groups=next((f.kv_heads for f in fields if f.cross and f.kv_heads != fields[0].kv_heads), None),
        out=converted,
        method=conversion.get("method", "mean"),
        seed=conversion.get("seed", 0),
        route=recorded_route(conversion),
        allow_slow=True,
        trust_remote_code=trust_remote_code,
    )
    checks = verify_structure(made, converted, trust_remote_code=trust_remote_code)
    checks |= compare_weights(made, converted)
    if checks["differing"] and record and "uptraining" not in record:
        raise VerificationError(
            f"{converted}: {checks['differing'][0]} is not what converting {made.source} by {made.method} gives "
            f"({len(checks['differing'])} such tensors)."
        )
    if logits:
        checks |= verify_logits(made, converted, trust_remote_code=trust_remote_code)
    return checks
