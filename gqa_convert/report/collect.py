"""Everything a report can show, read from a run folder. Imports no torch.

A run folder may come from anybody: names in it are names of folders in it and nothing else, values have their types,
and no file outside is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gqa_convert.checkpoint.links import stays_inside
from gqa_convert.errors import UsageError
from gqa_convert.evaluate.decode.results import Bench
from gqa_convert.evaluate.files import read_json
from gqa_convert.evaluate.metrics import bench_figures, finite
from gqa_convert.evaluate.results import Evaluation, LayerCost, LayerSimilarity
from gqa_convert.evaluate.sweep.points import Recommendation, SweepPoint, from_json
from gqa_convert.evaluate.sweep.uptrained import result_folder

if TYPE_CHECKING:
    from pydantic import TypeAdapter

METRICS = "metrics.jsonl"
_LONGEST_NAME = 200
_LONGEST_LOG = 256 << 20
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An uptraining run: loss against tokens seen (or steps, where tokens were not recorded).

    Attributes:
        name: where it lies in the run folder.
        unit: of the first number of each pair.
        train: training loss.
        held_out: held-out loss.
        reference: the original's held-out loss, where it was measured.
    """

    name: str
    unit: str
    train: tuple[tuple[float, float], ...]
    held_out: tuple[tuple[float, float], ...]
    reference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A decode benchmark with its conclusions in words, as `gqa bench` wrote them."""

    bench: Bench
    conclusions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Detail:
    """What point.json holds of a point beside its figures."""

    evaluation: Evaluation | None = None
    timed: Timed | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The cost of each layer alone, as `point` converts it."""

    point: str
    layers: tuple[LayerCost, ...]


@dataclass(frozen=True, kw_only=True)
class Similarities:
    """How alike the heads of a group are, with so many KV heads."""

    groups: int
    layers: tuple[LayerSimilarity, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: where it is.
        base: the original's evaluation; None where only uptraining or timing was recorded.
        points: of the sweep; empty for single measurements.
        details: by name of the point.
        recommendation: of the sweep; None without one.
        evaluations: files written by `gqa eval --out`.
        benches: files written by `gqa bench --out`.
        layers: cost of each layer alone.
        similarity: head similarity by layer.
        curves: uptraining runs below the folder.
    """

    folder: Path
    base: Evaluation | None
    points: tuple[SweepPoint, ...]
    details: dict[str, Detail]
    recommendation: Recommendation | None
    evaluations: tuple[Evaluation, ...]
    benches: tuple[Timed, ...]
    layers: Layers | None
    similarity: Similarities | None
    curves: tuple[Curve, ...] = field(default=())

    @property
    def done(self) -> tuple[SweepPoint, ...]:
        """Points that were measured."""
        return tuple(p for p in self.points if p.status == "done" and p.loss_difference is not None)

    @property
    def recommended(self) -> SweepPoint | None:
        """The point the sweep recommends."""
        name = self.recommendation.name if self.recommendation else None
        return next((point for point in self.done if point.name == name), None)

    @property
    def chosen(self) -> SweepPoint | None:
        """The recommended point, or else the one of least loss rise."""
        return self.recommended or min(self.done, key=lambda p: p.loss_difference or 0.0, default=None)

    def model_folder(self, point: SweepPoint) -> Path:
        """Where a point's converted model is, if it was kept.

        Raises:
            UsageError: if a link there leads out of the run folder.
        """
        return inside(self.folder, result_folder(inside(self.folder, self.folder / "points" / point.name)))


def inside(folder: Path, path: Path) -> Path:
    """Return `path` if it lies in `folder`, links resolved.

    Raises:
        UsageError: if it does not.
    """
    if not stays_inside(folder, path):
        raise UsageError(f"{path}: a link that leaves the run folder. Refused: put the folder itself there.")
    return path


_TOLD = ("converted", "quantised", "recall", "suite")
"""What there is to tell of an evaluation: the loss of an original alone says nothing."""


def read_run(folder: Path) -> Run:
    """Read what a sweep, `gqa eval --out` and `gqa bench --out` left in a folder.

    Raises:
        UsageError: if there is nothing to report in it, or a file is not what it should be.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Give the run folder of a `gqa sweep`.")
    sweep = _object(folder, folder / "sweep.json")
    summary = folder / "sweep.json"
    entries = sweep.get("points", [])
    points = tuple(
        _parsed(summary, f"points.{i}", _point, value)
        for i, value in enumerate(entries if isinstance(entries, list) else ())
    )
    details = {point.name: _detail(folder, point) for point in points}
    points = tuple(_complete(point, details[point.name]) for point in points)
    loose = {path: _object(folder, path, damaged_ok=True) for path in sorted(folder.glob("*.json"))}
    evaluations = tuple(
        _parsed(path, "", Evaluation.from_json, value)
        for path, value in loose.items()
        if value.get("kind") == "evaluation" and any(value.get(n) for n in _TOLD)
    )
    benches = tuple(_parsed(path, "", _timed, v) for path, v in loose.items() if v.get("kind") == "bench")
    curves = tuple(curve for path in sorted(folder.rglob(METRICS)) if (curve := _curve(path, folder)) is not None)
    if not (points or evaluations or benches or curves):
        raise UsageError(
            f"{folder}: holds nothing to report. Run `gqa sweep MODEL --out {folder.name}`, or `gqa eval` and "
            "`gqa bench` with --out into it, first."
        )
    if points:
        base: Evaluation | None = _parsed(summary, "base", Evaluation.from_json, sweep.get("base"))
    else:
        base = evaluations[0] if evaluations else None
    return Run(
        folder=folder,
        base=base,
        points=points,
        details=details,
        recommendation=_parsed(summary, "recommendation", _typed(Recommendation), sweep.get("recommendation"))
        if points
        else None,
        evaluations=evaluations,
        benches=benches,
        layers=_optional(folder, "sensitivity.json", Layers),
        similarity=_optional(folder, "similarity.json", Similarities),
        curves=curves,
    )


def _object(folder: Path, path: Path, *, damaged_ok: bool = False) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, or is other JSON and may be."""
    if not path.exists() and not path.is_symlink():
        return {}
    value = read_json(inside(folder, path))
    if isinstance(value, dict):
        # Half a surrogate pair is JSON, but no text that can be written.
        writable = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        cleaned: dict[str, Any] = json.loads(writable)
        return cleaned
    if damaged_ok:
        return {}
    raise UsageError(
        f"{path}: no JSON object that can be read. Run the `gqa sweep` again; it goes on where it stopped."
    )


def _parsed(path: Path, where: str, parse: Callable[[Any], _Value], value: Any) -> _Value:
    """Parse a part of a file; what is wrong with it becomes one line."""
    from pydantic import ValidationError

    try:
        return parse(value)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join([where, *map(str, first['loc'])]).strip('.')}: {first['msg']}"
    except ValueError as error:
        what = f"{where}: {error}".removeprefix(": ")
    raise UsageError(f"{path}: {what}. Not a file that gqa wrote, or a damaged one: measure again.")


def _typed(kind: type[_Value]) -> Callable[[Any], _Value]:
    """A function that makes a value of a dataclass from JSON and raises ValueError where it does not fit."""
    hashable: Any = kind
    validate: Callable[[Any], _Value] = _adapter(hashable).validate_python
    return validate


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _optional(folder: Path, name: str, kind: type[_Value]) -> _Value | None:
    values = _object(folder, folder / name)
    return _parsed(folder / name, "", _typed(kind), values) if values else None


def _point(value: Any) -> SweepPoint:
    point = from_json(value)
    name = point.name
    if not name or name != Path(name).name or name.startswith(".") or "\\" in name or not name.isprintable():
        raise ValueError(f"name {name!r} must be the name of a folder, without separators and no dot in front")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"name {name[:20]!r}... is longer than {_LONGEST_NAME} bytes")
    return point


def _timed(value: dict[str, Any]) -> Timed:
    conclusions = value.get("conclusions")
    return _typed(Timed)({"bench": value, "conclusions": conclusions if isinstance(conclusions, list) else []})


def _detail(folder: Path, point: SweepPoint) -> Detail:
    path = folder / "points" / point.name / "point.json"
    values = _object(folder, path)
    evaluation, bench, recipe = values.get("evaluation"), values.get("bench"), values.get("recipe")
    return Detail(
        evaluation=_parsed(path, "evaluation", Evaluation.from_json, evaluation) if evaluation else None,
        timed=_parsed(path, "bench", _timed, bench) if isinstance(bench, dict) else None,
        recipe=recipe if isinstance(recipe, dict) else {},
    )


def _complete(point: SweepPoint, detail: Detail) -> SweepPoint:
    """Add the figures that only the point's own file holds; older summaries left some out."""
    if detail.evaluation is None or not detail.evaluation.converted:
        return point
    measured = detail.evaluation.converted[0]
    figures = measured.model.figures | measured.figures | point.figures
    time = figures.get("time_ratio")
    if time is not None and not time.verdict and detail.timed is not None:
        figures |= bench_figures(detail.timed.bench)
    return replace(point, figures=figures)


def _curve(path: Path, folder: Path) -> Curve | None:
    if not path.is_file() or not stays_inside(folder, path) or path.stat().st_size > _LONGEST_LOG:
        return None
    records = [record for line in path.read_bytes().splitlines() if (record := _record(line)) is not None]
    losses = [r for r in records if r["kind"] in ("train", "evaluation") and r["loss"] is not None]
    if not losses:
        return None
    # Evaluations are logged by step; tokens per step are the same all along.
    unit = next(
        (u for u in ("tokens", "tokens_seen", "tokens_done") if any(r[u] and r["step"] for r in losses)), "step"
    )
    per_step = next((r[unit] / r["step"] for r in losses if unit != "step" and r[unit] and r["step"]), 1.0)
    pairs = {
        kind: tuple(
            (r[unit] if r[unit] is not None else r["step"] * per_step, r["loss"]) for r in losses if r["kind"] == kind
        )
        for kind in ("train", "evaluation")
    }
    name = path.parent.relative_to(folder).as_posix()
    return Curve(
        name="uptraining" if name == "." else name,
        unit="steps" if unit == "step" else unit.replace("_", " "),
        train=pairs["train"],
        held_out=pairs["evaluation"],
        reference=next((r["reference_loss"] for r in losses if r["reference_loss"] is not None), None),
    )


def _record(line: bytes) -> dict[str, Any] | None:
    """The numbers of a record that a curve is drawn from; None for a line that a killed run left unfinished."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or (step := finite(record.get("step"))) is None:
        return None
    loss = finite(record.get("loss" if record.get("kind") == "train" else "held_out_loss"))
    numbers = {name: finite(record.get(name)) for name in ("tokens", "tokens_seen", "tokens_done", "reference_loss")}
    return {
        "kind": record.get("kind"),
        "step": step,
        "loss": finite(record.get("loss")) if loss is None else loss,
    } | numbers
