"""Compare every tensor of a converted folder with what its plan's operations write, or with a recorded digest.

A copied tensor must have the source's bytes; one that is pooled or rewritten is computed again. Solving cannot be
repeated in seconds, nor training: their results must be finite and have the bytes whose digest the folder's record
holds, which tells damage, not whether solving was right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gqa_convert.checkpoint.contents import same_bytes, tensor_digest, tensor_pieces
from gqa_convert.checkpoint.dtypes import FLOATS, not_finite, tensor_bytes
from gqa_convert.checkpoint.reader import Checkpoint, read_tensor
from gqa_convert.checkpoint.safetensors_file import TensorInfo
from gqa_convert.conversion.operations import Copy, Operation, Pool, Rewrite, Solve
from gqa_convert.conversion.plan import ConvertPlan
from gqa_convert.conversion.recorded import Record
from gqa_convert.conversion.tensors import one_thread, pooled_tensor

_NAMES: dict[type[Operation], str] = {Copy: "identical", Rewrite: "rewritten", Pool: "merged", Solve: "solved"}


@dataclass(kw_only=True)
class Comparison:
    """How many tensors are what they should be, and how that was told; the keys of those that are not.

    Attributes:
        counts: by what a tensor is: `identical` (copied byte for byte), `rewritten`, `merged`, `solved`, `trained`
            (after the conversion).
        recomputed: tensors that were computed again from the source, with equal bytes.
        recorded_hash: tensors whose bytes have the digest that the record holds.
        unproven: tensors of which shape, dtype and finiteness alone could be told, as the record holds no digest.
        differing: tensors that are not what the conversion gives, of a folder without a record of training.
        damaged: tensors that are not those of the record, or not finite.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys([*_NAMES.values(), "trained"], 0))
    recomputed: int = 0
    recorded_hash: int = 0
    unproven: int = 0
    differing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            **self.counts,
            "recomputed": self.recomputed,
            "recorded_hash": self.recorded_hash,
            "unproven": self.unproven,
            "differing": self.differing,
        }


def compare_tensors(planned: ConvertPlan, written: Checkpoint, record: Record) -> Comparison:
    """Compare the tensors of `written` that a plan writes; their keys, shapes and dtypes must have been checked.

    Raises:
        CheckpointError: if a file can no longer be read, or the source holds values that cannot be averaged.
    """
    result = Comparison()
    with one_thread():
        for operation in planned.operations:
            if operation.key in written.tensors:
                _judge(result, planned, written.tensors[operation.key], operation, record)
    return result


def _judge(result: Comparison, planned: ConvertPlan, info: TensorInfo, operation: Operation, record: Record) -> None:
    key, name = operation.key, _NAMES[type(operation)]
    final, solved = record.final.get(key), record.solved.get(key)
    digest = tensor_digest(info) if final or isinstance(operation, Solve) else None
    if final and digest != final:
        result.damaged.append(key)
        return
    if isinstance(operation, Solve):
        as_converted = digest == solved if solved else not record.trained
    else:
        as_converted = same_bytes(info, _expected(planned, operation))
    if not as_converted and not record.trained:
        (result.damaged if isinstance(operation, Solve) else result.differing).append(key)
        return
    if not as_converted:
        name = "trained"
    if name in ("solved", "trained") and not _is_finite(info):
        result.damaged.append(key)
        return
    result.counts[name] += 1
    if name in ("merged", "rewritten"):
        result.recomputed += 1
    elif name != "identical":
        proven = final or (solved and name == "solved")
        result.recorded_hash += bool(proven)
        result.unproven += not proven


def _expected(planned: ConvertPlan, operation: Operation) -> Iterator[memoryview]:
    if isinstance(operation, Pool):
        yield tensor_bytes(pooled_tensor(planned.checkpoint, operation))
    else:
        yield from tensor_pieces(planned.checkpoint.tensors[operation.key])


def _is_finite(info: TensorInfo) -> bool:
    """True unless a float tensor holds a NaN or an infinity."""
    return info.dtype not in FLOATS or not not_finite(read_tensor(info))
