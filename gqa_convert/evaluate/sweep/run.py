"""Convert a model in many ways, measure every result, and say which to take.

Everything lives in a run folder, one folder per point. A point that is finished under the same settings is not done
again, so an interrupted sweep goes on where it stopped, and a longer list of groups only adds to it. A point that fails
is recorded with its reason, and the others go on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gqa_convert.checkpoint.fingerprint import sampled_digest
from gqa_convert.checkpoint.provenance import source_identity, versions
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.execute import execute
from gqa_convert.conversion.plan import ConvertPlan, plan
from gqa_convert.conversion.recipe import SELF, Recipe
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.deals import conclusions
from gqa_convert.evaluate.decode.bench import bench
from gqa_convert.evaluate.decode.contender import load_contenders
from gqa_convert.evaluate.evaluation import evaluate
from gqa_convert.evaluate.files import read_json, write_json
from gqa_convert.evaluate.kv_budget import plan_within
from gqa_convert.evaluate.metrics import bench_figures, rows
from gqa_convert.evaluate.results import Comparison
from gqa_convert.evaluate.samples import renamed
from gqa_convert.evaluate.sensitivity import layer_costs
from gqa_convert.evaluate.similarity import head_similarity
from gqa_convert.evaluate.sweep.points import Recommendation, SweepPoint, from_json, frontiers, recommend
from gqa_convert.evaluate.sweep.settings import Aim, SweepSettings
from gqa_convert.evaluate.sweep.uptrained import FOLDER, result_folder, uptrain_point
from gqa_convert.heads import HeadPlan
from gqa_convert.modeling import shipping
from gqa_convert.outcome import Outcome

SUMMARY = "sweep.json"
POINT = "point.json"
SENSITIVITY = "sensitivity.json"
SIMILARITY = "similarity.json"
SENSITIVITY_WINDOWS = 32


@dataclass(frozen=True, kw_only=True)
class Sweep(Outcome):
    """A finished sweep."""

    folder: Path
    base: dict[str, Any]
    points: tuple[SweepPoint, ...]
    recommendation: Recommendation

    def to_json(self) -> dict[str, Any]:
        """The sweep as JSON values, with both frontiers."""
        return {
            "format": 1,
            "kind": "sweep",
            "base": self.base,
            "points": [point.to_json() for point in self.points],
            "frontier": frontiers(self.points),
            "recommendation": asdict(self.recommendation),
            "versions": versions(),
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """A row per point."""
        return [point.to_json() for point in self.points]


def sweep(
    model: str,
    run: Path,
    settings: SweepSettings,
    *,
    on_point: Callable[[SweepPoint, bool], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> Sweep:
    """Run a sweep, or go on with one.

    Args:
        model: the original: a folder, a hub id, or `demo`.
        run: the run folder; made if missing.
        settings: what to try and how to measure it.
        on_point: called after each point, with True if it was there already.
        on_total: called once with the number of points.

    Raises:
        UsageError: if a variant or setting is unknown.
        GQAConvertError: if the original itself cannot be read or measured.
    """
    recipes = {variant: settings.recipe(variant) for variant in settings.variants}
    subject = models.subject(model, trust_remote_code=settings.evaluation.trust_remote_code)
    wrong = [g for g in settings.groups if subject.kv_heads % g]
    if wrong:
        raise UsageError(f"--groups {wrong[0]}: does not divide the {subject.kv_heads} KV heads of {subject.name}.")
    if not settings.allow_slow and (settings.budgets or min(settings.groups) < subject.kv_heads):
        shipping.check_faster(str(subject.config.model_type))
    if on_total is not None:
        on_total(len(recipes) * len(settings.aims))
    opened = Checkpoint.open(subject.folder)
    identity = source_identity(opened) | {"weights": sampled_digest(opened)}
    base = _base(subject, run, settings, identity)
    points: list[SweepPoint] = []
    for variant, recipe in recipes.items():
        for aim in settings.aims:
            point, known = _point(subject, run, settings, variant, recipe, aim, identity)
            points.append(point)
            write_json(run / SUMMARY, _summary(run, base, points, settings).to_json())
            if on_point is not None:
                on_point(point, known)
    finished = _summary(run, base, points, settings)
    if settings.sensitivity:
        _sensitivity(subject, run, settings, finished)
        _similarity(subject, run, settings, identity)
    return finished


def _summary(run: Path, base: dict[str, Any], points: Sequence[SweepPoint], settings: SweepSettings) -> Sweep:
    return Sweep(folder=run, base=base, points=tuple(points), recommendation=recommend(points, settings.tolerance))


def _fingerprint(*parts: Any) -> str:
    installed = list(versions().values())
    return hashlib.sha256(json.dumps([installed, *parts], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stamp(text: str | None) -> list[int]:
    """What tells a file of text from what was there before under the same name; nothing for what is no file."""
    file = Path(text) if text else None
    if file is None or not file.is_file():
        return []
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _measuring(settings: SweepSettings) -> Any:
    """What decides the figures of a model: the data, how it is cut, and which metrics there are."""
    return [asdict(settings.evaluation), [metric.name for metric in rows()]]


def _known(file: Path, key: str) -> SweepPoint | None:
    """A point that was finished under the same settings; None where it was not, or its file is damaged."""
    known = _of_this_key(file, key)
    try:
        point = from_json(known.get("point", {})) if known is not None else None
    except ValueError:
        return None
    return point if point is not None and point.status == "done" else None


def _of_this_key(file: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run wrote under the same settings; None where it did not, or the file is damaged."""
    known = read_json(file)
    return known if isinstance(known, dict) and known.get("fingerprint") == key else None


def _base(subject: models.Subject, run: Path, settings: SweepSettings, identity: dict[str, Any]) -> dict[str, Any]:
    """The original's own figures, and what it was measured on."""
    key = _fingerprint(identity, _measuring(settings), _stamp(settings.evaluation.data))
    known = _of_this_key(run / "base.json", key)
    if known is not None:
        return known
    measured = evaluate(subject.folder, [], settings.evaluation).to_json()
    measured |= {"fingerprint": key, "folder": str(subject.folder.resolve())}
    measured["base"]["name"] = subject.name
    write_json(run / "base.json", measured)
    return measured


def _point(
    subject: models.Subject,
    run: Path,
    settings: SweepSettings,
    variant: str,
    recipe: Recipe,
    aim: Aim,
    identity: dict[str, Any],
) -> tuple[SweepPoint, bool]:
    name = aim.name(variant)
    folder = run / "points" / name
    benchmark = None if settings.benchmark is None else asdict(settings.benchmark)
    trained = [settings.uptrain_tokens, settings.uptrain_config.read_text() if settings.uptrain_config else ""]
    texts = [_stamp(settings.evaluation.data), _stamp(recipe.calibrate)]
    wanted = aim.budget or aim.groups
    key = _fingerprint(identity, recipe.to_json(), wanted, _measuring(settings), benchmark, trained, texts)
    known = _known(folder / POINT, key)
    if known is not None:
        return known, True
    start = _fingerprint(identity, recipe.to_json(), _stamp(recipe.calibrate), wanted, trained)
    try:
        measured = _measure(subject, folder, settings, aim, variant, recipe, start)
    except Exception as error:  # whatever a model's own code may raise: the other points go on
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        measured = {
            "point": SweepPoint(
                name=name, variant=variant, groups=aim.groups, budget=aim.budget, status="failed", error=why
            ).to_json()
        }
    write_json(folder / POINT, {"fingerprint": key, "recipe": recipe.to_json()} | measured)
    return from_json(measured["point"]), False


def _measure(
    subject: models.Subject,
    folder: Path,
    settings: SweepSettings,
    aim: Aim,
    variant: str,
    recipe: Recipe,
    start: str,
) -> dict[str, Any]:
    name, trust = aim.name(variant), settings.evaluation.trust_remote_code
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model"
    started = time.perf_counter()
    conversion, work = _planned(subject, folder, settings, aim, variant, recipe)
    execute(conversion, force=True, work=work)
    groups = conversion.anatomy.groups
    per_layer = groups.counts if isinstance(groups, HeadPlan) else ()
    seconds = time.perf_counter() - started
    if settings.uptrain_tokens and settings.uptrain_config is not None:
        target = uptrain_point(
            target, folder / FOLDER, config=settings.uptrain_config, tokens=settings.uptrain_tokens, key=start
        )
    elif (folder / FOLDER).exists():
        shutil.rmtree(folder / FOLDER)
    evaluation = evaluate(subject.folder, [target], settings.evaluation)
    compared = evaluation.converted[0]
    compared = replace(compared, model=replace(compared.model, name=name))
    evaluation = replace(
        evaluation,
        base=replace(evaluation.base, name=subject.name),
        converted=(compared,),
        quantised=_named(evaluation.quantised, subject.name, name),
        samples=renamed(evaluation.samples, [subject.name, name]),
    )
    measured = bench_json = None
    if settings.benchmark is not None:
        contenders = load_contenders(
            [subject.folder, target],
            dtype=settings.evaluation.dtype,
            device=settings.evaluation.device,
            trust_remote_code=trust,
        )
        contenders[0] = replace(contenders[0], name=subject.name)
        contenders[1] = replace(contenders[1], name=name)
        measured = bench(contenders, settings.benchmark)
        bench_json = measured.to_json()
    point = SweepPoint(
        name=name,
        variant=variant,
        groups=groups if isinstance(groups, int) else -(-sum(per_layer) // len(per_layer)),
        groups_per_layer=per_layer,
        budget=aim.budget,
        status="done",
        figures=compared.model.figures | compared.figures | (bench_figures(measured) if measured else {}),
        convert_seconds=seconds,
        uptrained_tokens=settings.uptrain_tokens,
        deal=next(reversed(conclusions(evaluation)), ""),
    )
    if not settings.keep_models:
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    return {"point": point.to_json(), "evaluation": evaluation.to_json(), "bench": bench_json}


def _planned(
    subject: models.Subject, folder: Path, settings: SweepSettings, aim: Aim, variant: str, recipe: Recipe
) -> tuple[ConvertPlan, Path | None]:
    """The conversion, and the folder that keeps what was solved for it, if it is kept."""
    shared: dict[str, Any] = {
        "out": folder / "model",
        "recipe": recipe,
        "allow_slow": settings.allow_slow,
        "trust_remote_code": settings.evaluation.trust_remote_code,
    }
    if not aim.budget:
        return plan(subject.folder, groups=aim.groups, **shared), None
    # Chosen on other text than it is measured on, wherever there is any: the calibration's, or what the model writes.
    text = recipe.calibrate if recipe.calibrate != SELF else None
    data = settings.evaluation.data if subject.is_encoder_decoder and text is None else text
    work = folder.parent.parent / "work" / variant
    work.mkdir(parents=True, exist_ok=True)
    return plan_within(subject.folder, budget=aim.budget, data=data, work=work, **shared), work


def _named(quantised: Sequence[Comparison], original: str, point: str) -> tuple[Comparison, ...]:
    """Models with caches in fewer bits, the original's first, by the names that a sweep gives them."""
    half = len(quantised) // 2
    names = [original] * half + [point] * half
    return tuple(
        replace(c, model=replace(c.model, name=f"{name}, {c.model.cache} cache"))
        for name, c in zip(names, quantised, strict=True)
    )


def _sensitivity(subject: models.Subject, run: Path, settings: SweepSettings, finished: Sweep) -> None:
    """Measure the layers of the recommended point, else of the one of least loss that lost anything at all."""
    evaluation = replace(
        settings.evaluation,
        max_windows=min(settings.evaluation.max_windows or SENSITIVITY_WINDOWS, SENSITIVITY_WINDOWS),
    )
    done = [p for p in finished.points if p.status == "done" and p.groups < subject.kv_heads]
    done.sort(key=lambda p: (p.name != finished.recommendation.name, p.loss_difference))
    key = _fingerprint([read_json(run / "points" / p.name / POINT) for p in done], asdict(evaluation))
    if _of_this_key(run / SENSITIVITY, key) is not None:
        return
    for point in done:
        folder = result_folder(run / "points" / point.name)
        costs = layer_costs(subject.folder, folder, evaluation) if folder.is_dir() else []
        if costs:
            layers = [cost.to_json() for cost in costs]
            write_json(run / SENSITIVITY, {"fingerprint": key, "point": point.name, "layers": layers})
            return


def _similarity(subject: models.Subject, run: Path, settings: SweepSettings, identity: dict[str, Any]) -> None:
    """Compare the heads of the groups; left out for an architecture whose heads cannot be aligned."""
    groups = [g for g in settings.groups if g < subject.kv_heads]
    key = _fingerprint(identity, max(groups, default=0))
    if not groups or _of_this_key(run / SIMILARITY, key) is not None:
        return
    try:
        layers = head_similarity(subject.folder, max(groups), trust_remote_code=settings.evaluation.trust_remote_code)
    except UnsupportedModelError as error:
        write_json(run / SIMILARITY, {"fingerprint": key, "groups": max(groups), "layers": [], "why": str(error)})
        return
    written = [layer.to_json() for layer in layers]
    write_json(run / SIMILARITY, {"fingerprint": key, "groups": max(groups), "layers": written})
