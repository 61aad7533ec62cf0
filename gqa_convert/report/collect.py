"""Everything a report can show, read from a run folder. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gqa_convert.errors import UsageError
from gqa_convert.evaluate.files import read_json
from gqa_convert.evaluate.sweep.points import SweepPoint, from_json
from gqa_convert.evaluate.sweep.uptrained import result_folder

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An uptraining run: loss against tokens seen (or steps, where tokens were not recorded)."""

    name: str
    unit: str
    train: tuple[tuple[float, float], ...]
    held_out: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: where it is.
        base: the original's evaluation, as `gqa eval` writes it.
        points: of the sweep; empty for single measurements.
        details: per point name, its `evaluation`, `bench` and `recipe`.
        sweep: sweep.json; empty without one.
        evaluations: files written by `gqa eval --out`.
        benches: files written by `gqa bench --out`.
        layers: cost of each layer alone, and of which point.
        similarity: head similarity a layer.
        curves: uptraining runs below the folder.
    """

    folder: Path
    base: dict[str, Any]
    points: tuple[SweepPoint, ...]
    details: dict[str, dict[str, Any]]
    sweep: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...]
    benches: tuple[dict[str, Any], ...]
    layers: dict[str, Any]
    similarity: dict[str, Any]
    curves: tuple[Curve, ...] = field(default=())

    @property
    def done(self) -> tuple[SweepPoint, ...]:
        """Points that were measured."""
        return tuple(point for point in self.points if point.status == "done")

    @property
    def recommended(self) -> SweepPoint | None:
        """The point the sweep recommends."""
        name = self.sweep.get("recommendation", {}).get("name")
        return next((point for point in self.points if point.name == name), None)

    @property
    def chosen(self) -> SweepPoint | None:
        """The recommended point, or else the one of least loss rise."""
        return self.recommended or min(self.done, key=lambda p: p.loss_difference or 0.0, default=None)

    def model_folder(self, point: SweepPoint) -> Path:
        """Where a point's converted model is, if it was kept."""
        return result_folder(self.folder / "points" / point.name)


def read_run(folder: Path) -> Run:
    """Read what a sweep, `gqa eval --out` and `gqa bench --out` left in a folder.

    Raises:
        UsageError: if there is nothing to report in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Give the run folder of a `gqa sweep`.")
    sweep = read_json(folder / "sweep.json") or {}
    points = tuple(from_json(value) for value in sweep.get("points", ()))
    loose = [value for path in sorted(folder.glob("*.json")) if isinstance(value := read_json(path), dict)]
    evaluations = tuple(v for v in loose if v.get("kind") == "evaluation" and v.get("converted"))
    benches = tuple(v for v in loose if v.get("kind") == "bench")
    curves = tuple(curve for path in sorted(folder.rglob(METRICS)) if (curve := _curve(path, folder)) is not None)
    if not (points or evaluations or benches or curves):
        raise UsageError(
            f"{folder}: holds nothing to report. Run `gqa sweep MODEL --run {folder.name}`, or `gqa eval` and "
            "`gqa bench` with --out into it, first."
        )
    base = sweep.get("base") or (evaluations[0] if evaluations else {})
    return Run(
        folder=folder,
        base=base,
        points=points,
        details={p.name: read_json(folder / "points" / p.name / "point.json") or {} for p in points},
        sweep=sweep,
        evaluations=evaluations,
        benches=benches,
        layers=read_json(folder / "sensitivity.json") or {},
        similarity=read_json(folder / "similarity.json") or {},
        curves=curves,
    )


def _curve(path: Path, folder: Path) -> Curve | None:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a run was killed while it wrote its last line
            continue
        if isinstance(record, dict) and isinstance(record.get("loss"), (int, float)) and "step" in record:
            records.append(record)
    if not records:
        return None
    unit = next((name for name in ("tokens_seen", "tokens_done") if all(name in r for r in records)), "step")
    train = tuple((float(r[unit]), float(r["loss"])) for r in records if r.get("kind") == "train")
    held_out = tuple((float(r[unit]), float(r["loss"])) for r in records if r.get("kind") == "evaluation")
    name = path.parent.relative_to(folder).as_posix()
    return Curve(
        name="uptraining" if name == "." else name, unit=unit.replace("_", " "), train=train, held_out=held_out
    )
