"""The package from Python: `gqa_convert.convert` and its like, each what the command of its name does.

Errors name arguments as Python spells them. `on_progress(what, done, total)` is called while something goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from gqa_convert.conversion.recipe import Recipe, make_recipe
from gqa_convert.errors import GQAConvertError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gqa_convert.conversion.execute import ConvertResult, OnBytes, OnLayer
    from gqa_convert.conversion.inspect import Inspection
    from gqa_convert.evaluate.decode.results import Bench
    from gqa_convert.evaluate.results import Evaluation
    from gqa_convert.evaluate.sweep.run import Sweep
    from gqa_convert.report.writing import Report
    from gqa_convert.uptrain.config import UptrainConfig
    from gqa_convert.uptrain.heal import HealResult
    from gqa_convert.uptrain.loop import UptrainResult

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""
Model = str | Path
Groups = int | Sequence[int]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_RENAMED = {"calibration-sequences": "sequences", "calibration-length": "length", "set": "overrides"}


def _named_as_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let the function's errors speak of `max_windows`, not of `--max-windows`."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except GQAConvertError as error:
            message = as_arguments(str(error))
            if message == str(error):
                raise
            raise type(error)(message) from error

    return run


def as_arguments(message: str) -> str:
    """A message with flags spelled as arguments: `--max-windows 0` is `max_windows 0`."""
    return re.sub(r"(?<![\w-])--(?:no-)?([a-z][a-z-]*)", lambda m: _RENAMED.get(m[1], m[1]).replace("-", "_"), message)


@overload
def convert(model: Model, groups: Groups, **choices: Any) -> ConvertResult: ...
@overload
def convert(model: PreTrainedModel, groups: Groups, *, out: None = None, **choices: Any) -> PreTrainedModel: ...
@overload
def convert(model: PreTrainedModel, groups: Groups, *, out: Model, **choices: Any) -> ConvertResult: ...
@_named_as_arguments  # type: ignore[misc]
def convert(
    model: Any,
    groups: Groups,
    *,
    preset: str | None = None,
    calibrate: str | None = None,
    recipe: Recipe | None = None,
    method: str | None = None,
    seed: int | None = None,
    out: Model | None = None,
    cross_groups: int | None = None,
    keep_layers: str = "",
    tensor_parallel: int = 1,
    min_groups: int = 1,
    route: str = "auto",
    allow_slow: bool = False,
    verify: str = "structure",
    force: bool = False,
    work: Model | None = None,
    flush: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    measure: bool = False,
    data: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_bytes: OnBytes | None = None,
    on_layer: OnLayer | None = None,
    on_progress: OnProgress | None = None,
) -> Any:
    """Convert a model to `groups` KV heads.

    Args:
        model: a checkpoint folder, a hub id, `demo`, or a live transformers model, which is not changed.
        groups: KV heads after the conversion; 1 is multi-query attention. A sequence: one number per decoder layer.
        preset: `paper`, `fast` or `best`; see `gqa_convert.conversion.recipe.PRESETS`.
        calibrate: text to measure layers on: a file, a folder, a hub dataset, `demo` or `self`.
        recipe: all choices about the merge at once, in place of `preset`, `calibrate`, `method` and `seed`.
        method: a merge method by name (`gqa methods`).
        seed: for what is drawn at random.
        out: folder to write; by default `<model>-gqa<groups>` beside the model. For a live model, None gives a live
            model back.
        cross_groups: KV heads of cross-attention, where a model sets them apart.
        keep_layers: layers that keep all their KV heads: `first,last`, `0,5`, `0-3`.
        tensor_parallel: devices that are to share the KV heads of every layer without copies.
        min_groups: KV heads that every layer is to have at least.
        route: `native`, `remote-code` or `auto`, for families without a setting for KV heads.
        allow_slow: also convert families that decode no faster.
        verify: `none`, `structure` or `logits`.
        force: replace an earlier conversion at `out`.
        work: folder that keeps solved layers.
        flush: wait until the disk has everything.
        device: where blocks are solved and models run: `auto`, `cpu`, `cuda:1`, ...
        dtype: what layers run in while blocks are solved: `auto` (float32), `bfloat16`, `float16`.
        measure: score a held-out sample before and after; the result's `quality` has the figures, and so has the card.
        data: held-out text for that; by default text that the model writes.
        tokenizer: of a live model, where text is to be read.
        trust_remote_code: run Python code that the checkpoint brings along.
        revision: branch, tag or commit of a hub id.
        on_bytes: called with the bytes written since its last call.
        on_layer: called with what is being done, the layers finished, and all of them.
        on_progress: called for both.

    Returns:
        The finished conversion; of a live model without `out`, a live model in the same dtype, on the same device.

    Raises:
        GQAConvertError: of the kind that fits; nothing is left at `out` then.
    """
    settled = recipe or make_recipe(preset, method=method, seed=seed, calibrate=calibrate)
    if recipe is not None and (preset, method, seed, calibrate) != (None,) * 4:
        raise UsageError("recipe: says all about the merge; give no preset, method, seed or calibrate besides.")
    chosen: dict[str, Any] = {
        "groups": groups,
        "cross_groups": cross_groups,
        "keep_layers": keep_layers,
        "tensor_parallel": tensor_parallel,
        "min_groups": min_groups,
        "recipe": settled,
        "route": route,
        "allow_slow": allow_slow,
        "verify": verify,
        "force": force,
        "work": work,
        "flush": flush,
        "device": device,
        "dtype": dtype,
        "measure": measure or data is not None,
        "data": data,
        "trust_remote_code": trust_remote_code,
        "on_bytes": on_bytes,
        "on_layer": on_layer,
        "on_progress": on_progress,
    }
    if isinstance(model, str | Path):
        return _convert_folder(model, out, revision=revision, **chosen)
    return _convert_live(model, out, tokenizer, **chosen)


def _convert_folder(
    model: Model, out: Model | None, *, measure: bool, data: str | None, on_progress: OnProgress | None, **chosen: Any
) -> ConvertResult:
    from gqa_convert.conversion.execute import execute
    from gqa_convert.conversion.plan import plan
    from gqa_convert.evaluate.quality import recorded_quality

    of_plan = (
        "groups",
        "cross_groups",
        "keep_layers",
        "tensor_parallel",
        "min_groups",
        "recipe",
        "route",
        "allow_slow",
        "trust_remote_code",
        "revision",
    )
    planned = plan(model, out=out, **{name: chosen.pop(name) for name in of_plan if name in chosen})
    if on_progress is not None:
        written = _Counted("writing", on_progress)
        written.total(planned.bytes_out)
        chosen["on_bytes"] = _both(chosen["on_bytes"], written.advance)
        chosen["on_layer"] = _both(chosen["on_layer"], on_progress)
    result = execute(planned, **chosen)
    return recorded_quality(result, data=data, insist=True, device=chosen["device"])[0] if measure else result


def _convert_live(model: Any, out: Model | None, tokenizer: Any, **chosen: Any) -> Any:
    """By way of the disk: a folder is what conversions read, a part at a time, whatever the model's size."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise UsageError(f"model: a {type(model).__name__}, neither a folder, a hub id nor a transformers model.")
    from gqa_convert.hf.api import quiet
    from gqa_convert.hf.loading import Source, load_model

    name = Path(str(getattr(model.config, "_name_or_path", "") or "model")).name or "model"
    with TemporaryDirectory(prefix="gqa-convert-") as folder:
        source = Path(folder) / name
        with quiet():
            model.save_pretrained(source)
            if tokenizer is not None:
                tokenizer.save_pretrained(source)
        result = _convert_folder(source, Path(folder) / "converted" if out is None else out, **chosen)
        if out is not None:
            return result
        converted = load_model(
            Source.open(result.out, trust_remote_code=chosen["trust_remote_code"]),
            dtype=model.dtype,
            device=model.device,
        )
    return converted.train(model.training)


def _both(first: Callable[..., None] | None, second: Callable[..., None]) -> Callable[..., None]:
    if first is None:
        return second

    def call(*args: Any) -> None:
        first(*args)
        second(*args)

    return call


class _Counted:
    """Turns two callbacks, one for the total and one for what is done, into one."""

    def __init__(self, what: str, on_progress: OnProgress | None) -> None:
        self._what, self._tell, self._done, self._total = what, on_progress, 0, 0

    def total(self, count: int) -> None:
        self._total = count

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._tell is not None:
            self._tell(self._what, self._done, self._total)


@_named_as_arguments
def inspect(model: Model, *, trust_remote_code: bool = False, revision: str | None = None) -> Inspection:
    """Describe a checkpoint without reading its weights: head layout, legal group counts, cache bytes.

    Raises:
        GQAConvertError: if it cannot be read, or has no KV heads to merge.
    """
    from gqa_convert.conversion.inspect import inspect as look

    return look(model, trust_remote_code=trust_remote_code, revision=revision)


@_named_as_arguments
def verify(source: Model, converted: Model, *, logits: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """Check a converted folder against its source; see `gqa_convert.conversion.inspect.verify_pair`.

    Raises:
        VerificationError: if something is not what the folder's record makes of it.
    """
    from gqa_convert.conversion.inspect import verify_pair

    return verify_pair(source, Path(converted), logits=logits, trust_remote_code=trust_remote_code)


@_named_as_arguments
def evaluate(
    base: Model,
    converted: Model | Sequence[Model] = (),
    *,
    data: str,
    tasks: Sequence[str] = (),
    tasks_limit: int | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure how much worse converted models are on held-out text.

    Args:
        base: the original: a folder, a hub id, or `demo`.
        converted: a conversion of it, or several.
        data: held-out text: a file, a folder, a hub dataset, or `demo`.
        tasks: lm-eval tasks to run too.
        tasks_limit: examples of each.
        on_progress: called with windows done.
        settings: fields of `gqa_convert.evaluate.evaluation.EvalSettings`: `context`, `stride`, `max_windows` (None:
            all), `batch_size`, `dtype`, `device`, `trust_remote_code`, ...

    Raises:
        GQAConvertError: of the kind that fits.
    """
    from gqa_convert.evaluate import evaluation

    chosen = _settings(evaluation.EvalSettings, settings | {"data": data})
    folders = _listed(converted)
    windows = _Counted("windows", on_progress)
    result = evaluation.evaluate(base, folders, chosen, on_windows=windows.advance, on_total=windows.total)
    if tasks:
        result = evaluation.with_tasks(result, [base, *folders], list(tasks), chosen, limit=tasks_limit)
    return result


@_named_as_arguments
def bench(
    base: Model,
    converted: Model | Sequence[Model] = (),
    *,
    engine: str | None = None,
    engine_python: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Bench:
    """Measure how fast models decode, all of them in memory together.

    Args:
        base: the original.
        converted: a conversion of it, or several.
        engine: time an engine instead, of `gqa_convert.evaluate.engines.known.ENGINES`; its cache and mode are its own.
        engine_python: a Python that has the engine; by default this one.
        dtype: of the weights.
        device: where they run.
        trust_remote_code: run Python code that a checkpoint brings along.
        on_progress: called with points done.
        settings: fields of `gqa_convert.evaluate.decode.settings.BenchSettings`: `batches`, `contexts`, `caches`,
            `mode`, `steps`, `rounds`, ...

    Raises:
        GQAConvertError: of the kind that fits.
    """
    from gqa_convert.evaluate.decode import bench as benchmark
    from gqa_convert.evaluate.decode.contender import load_contenders
    from gqa_convert.evaluate.decode.settings import BenchSettings

    chosen = _settings(BenchSettings, settings)
    points = _Counted("points", on_progress)
    if engine is not None:
        from gqa_convert.evaluate.engines.bench import bench_engine

        points.total(len(chosen.batches) * len(chosen.contexts))
        return bench_engine(
            [base, *_listed(converted)],
            engine,
            chosen,
            python=engine_python,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_point=lambda _: points.advance(),
        )
    contenders = load_contenders(
        [base, *_listed(converted)], dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    points.total(len(chosen.batches) * len(chosen.contexts) * len(chosen.caches))
    return benchmark.bench(contenders, chosen, on_point=lambda _: points.advance())


@_named_as_arguments
def sweep(
    model: Model,
    groups: Sequence[int],
    *,
    out: Model,
    data: str,
    methods: Sequence[str] = ("mean",),
    benchmark: bool = True,
    evaluation: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Sweep:
    """Convert by every method to every number of groups, measure each, and recommend one; goes on where it stopped.

    Args:
        model: the original.
        groups: KV-head counts.
        out: run folder; `report(out)` makes a page of it.
        data: held-out text.
        methods: merge methods or presets.
        benchmark: also time decoding.
        evaluation: fields of `EvalSettings` beside `data`.
        on_progress: called with points done.
        settings: fields of `gqa_convert.evaluate.sweep.settings.SweepSettings`: `tolerance`, `calibrate`, `refit`, ...

    Raises:
        GQAConvertError: of the kind that fits.
    """
    from gqa_convert.evaluate.decode.settings import BenchSettings
    from gqa_convert.evaluate.evaluation import EvalSettings
    from gqa_convert.evaluate.sweep import run as sweeping
    from gqa_convert.evaluate.sweep.settings import SweepSettings

    timing = BenchSettings(batches=(8,), contexts=(2048,), caches=("static",), prefill_tokens=0) if benchmark else None
    chosen = _settings(
        SweepSettings,
        {"benchmark": timing}
        | settings
        | {
            "groups": tuple(groups),
            "variants": tuple(methods),
            "evaluation": _settings(EvalSettings, {**(evaluation or {}), "data": data}),
        },
    )
    points = _Counted("points", on_progress)
    return sweeping.sweep(str(model), Path(out), chosen, on_point=lambda *_: points.advance(), on_total=points.total)


@_named_as_arguments
def uptrain(
    config: Model | Mapping[str, Any] | UptrainConfig,
    *,
    overrides: Sequence[str] = (),
    quiet: bool = True,
    on_progress: OnProgress | None = None,
) -> UptrainResult:
    """Uptrain a converted model; the same call goes on where it was stopped.

    Args:
        config: a run's YAML file, its settings as a dictionary, or an `UptrainConfig`.
        overrides: changes to a file's settings: `section.key=value`.
        quiet: show no progress on standard error.
        on_progress: called with steps done.

    Raises:
        GQAConvertError: of the kind that fits.
    """
    from gqa_convert.uptrain.config import UptrainConfig
    from gqa_convert.uptrain.loop import uptrain as run
    from gqa_convert.uptrain.read_config import load_config, parse_config

    if isinstance(config, UptrainConfig):
        settled = config
    elif isinstance(config, Mapping):
        settled = parse_config(dict(config))
    else:
        settled = load_config(Path(config), overrides)
    return run(settled, quiet=quiet, on_progress=on_progress)


@_named_as_arguments
def heal(
    converted: Model, original: Model, *, out: Model, quiet: bool = True, force: bool = False, **options: Any
) -> HealResult:
    """Distil the original into a converted model's attention; see `gqa_convert.uptrain.heal.heal`.

    Args:
        converted: the converted folder.
        original: the model before conversion.
        out: folder to write.
        quiet: show no progress on standard error.
        force: replace an earlier model at `out`.
        options: fields of `gqa_convert.uptrain.heal.HealOptions`: `text`, `tokens`, `until`, ...

    Raises:
        GQAConvertError: of the kind that fits.
    """
    from gqa_convert.uptrain import heal as healing

    chosen = _settings(healing.HealOptions, options)
    return healing.heal(converted, original, out=out, options=chosen, quiet=quiet, force=force)


@_named_as_arguments
def report(run: Model, *, cards: bool = True, base_model: str = "") -> Report:
    """Write one page of a run folder, its plots and the model cards; see `gqa_convert.report.writing.write_report`.

    Raises:
        GQAConvertError: of the kind that fits.
    """
    from gqa_convert.report.writing import write_report

    return write_report(Path(run), cards=cards, base_model=base_model)


def _listed(models: Model | Sequence[Model]) -> list[Model]:
    return [models] if isinstance(models, str | Path) else list(models)


def _settings(kind: Any, values: Mapping[str, Any]) -> Any:
    """A settings object; a name that it has not is told with the nearest.

    Raises:
        UsageError: if there is no such setting.
    """
    from dataclasses import fields

    from gqa_convert.errors import did_you_mean

    known = [each.name for each in fields(kind)]
    for name in values:
        if name not in known:
            raise UsageError(f"{name}: no such argument. {did_you_mean(name, known).capitalize()}")
    return kind(**values)
