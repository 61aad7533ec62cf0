"""`gqa eval`, `gqa bench`, `gqa sweep`: thin, and free of heavy imports until one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gqa_convert.cli.options import (
    MOST_WINDOWS,
    AllowSlow,
    AsJson,
    Base,
    BatchSize,
    Calibrate,
    Context,
    Converted,
    Data,
    Device,
    Dtype,
    Eos,
    Field,
    MaxWindows,
    QuantisedCache,
    Revision,
    Samples,
    SaveTo,
    Separator,
    Special,
    Stride,
    Trust,
    held_out,
    named_list,
    one_of,
    save,
)
from gqa_convert.cli.running import emit
from gqa_convert.conversion.recipe import PRESETS
from gqa_convert.errors import UsageError, check_choice
from gqa_convert.evaluate.engines.known import ENGINES
from gqa_convert.merge.registry import all_methods
from gqa_convert.progress import Counter

_CACHES = "dynamic,static"


def eval_command(
    base: Base,
    converted: Converted = None,
    data: Data = None,
    field: Field = "text",
    separator: Separator = "",
    context: Context = None,
    stride: Stride = None,
    max_windows: MaxWindows = MOST_WINDOWS,
    special: Special = True,
    eos: Eos = True,
    loss_on: Annotated[
        str, typer.Option(help="Of conversations (rows of messages): score the assistant's turns, or all.")
    ] = "assistant",
    batch_size: BatchSize = 8,
    quantised_cache: QuantisedCache = "",
    recall: Annotated[
        str, typer.Option(help="Also ask for what was told in texts of so many tokens: 512,1k,2k, a list.")
    ] = "",
    recall_items: Annotated[int, typer.Option(help="Questions of each kind at each length.", min=1)] = 20,
    suite: Annotated[
        bool,
        typer.Option(
            "--suite",
            help="Also run tasks made here: the true continuation among four, greedy agreement, arithmetic, copying, "
            "JSON repair, small functions that must run; and --recall at 1k and 2k where it is not set. Of an "
            "encoder-decoder: ROUGE of its answers, word errors of its transcripts (needs the `eval` extra).",
        ),
    ] = False,
    suite_kinds: Annotated[
        str,
        typer.Option(
            help="Of the suite only these: continuations, agreement, arithmetic, copying, json, code, a list; of an "
            "encoder-decoder rouge, of one that listens wer."
        ),
    ] = "",
    suite_items: Annotated[int, typer.Option(help="Items of each kind.", min=1)] = 50,
    suite_seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
    samples: Samples = 0,
    tasks: Annotated[str, typer.Option(help="Also run these lm-eval tasks: names or .yaml files, a list.")] = "",
    tasks_limit: Annotated[int | None, typer.Option(help="Examples of each task.", min=1)] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    json: AsJson = False,
    out: SaveTo = None,
) -> None:
    """Measure how much worse a converted model is on held-out text, and how much smaller."""
    data = held_out(data, base)
    from gqa_convert.cli import show_evaluation
    from gqa_convert.evaluate.evaluation import EvalSettings, evaluate, with_tasks
    from gqa_convert.evaluate.metrics import RECALL
    from gqa_convert.evaluate.recall import usual_contexts

    settings = EvalSettings(
        data=data,
        field=field,
        separator=separator,
        context=context,
        stride=stride,
        max_windows=max_windows or None,
        special=special,
        eos=eos,
        loss_on=loss_on,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        caches=named_list(quantised_cache),
        samples=samples,
    )
    asked = None
    if suite or suite_kinds:
        from gqa_convert.evaluate.suite.run import SuiteSettings

        asked = SuiteSettings(kinds=named_list(suite_kinds), count=suite_items, seed=suite_seed)
    base = located(base, revision)
    if suite and not suite_kinds and not recall:
        recall = usual_contexts(base, trust_remote_code=trust_remote_code)
    with Counter("windows", quiet=json) as progress:
        evaluation = evaluate(base, converted or [], settings, on_windows=progress.advance, on_total=progress.total)
    if asked is not None:
        from gqa_convert.evaluate.suite.run import with_suite

        folders = [base, *(converted or [])]
        with Counter("items", quiet=json) as progress:
            evaluation = with_suite(
                evaluation, folders, settings, asked, on_items=progress.advance, on_total=progress.total
            )
    if recall:
        from gqa_convert.budget.counts import parse_counts
        from gqa_convert.evaluate.recall import with_recall

        contexts = parse_counts(recall, "--recall")
        folders = [base, *(converted or [])]
        with Counter("questions", quiet=json) as progress:
            progress.total(len(RECALL) * len(contexts) * recall_items * len(folders))
            evaluation = with_recall(
                evaluation, folders, contexts, settings, count=recall_items, on_items=progress.advance
            )
    if tasks:
        evaluation = with_tasks(evaluation, [base, *(converted or [])], tasks.split(","), settings, limit=tasks_limit)
    save(evaluation.to_json(), out)
    emit(evaluation.to_json(), json, lambda: show_evaluation.show_evaluation(evaluation))


def bench_command(
    base: Base,
    converted: Converted = None,
    batch: Annotated[str, typer.Option(help="Sequences decoded together: a list.")] = "1,8",
    cache_context: Annotated[str, typer.Option(help="Tokens in the cache: a list (8k is 8192).")] = "512,2k",
    source_tokens: Annotated[
        str, typer.Option(help="Tokens that the encoder has read, for models with one (default: as the context)")
    ] = "",
    cache: Annotated[
        str, typer.Option(help="dynamic, static; fp8, int8, int4: rounded as engines do: a list.")
    ] = _CACHES,
    mode: Annotated[
        str,
        typer.Option(
            help="eager; compile: torch.compile, with CUDA graphs on a GPU; graph: one CUDA graph, uncompiled."
        ),
    ] = "eager",
    steps: Annotated[int, typer.Option(help="Tokens decoded per round.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed rounds per point.")] = 7,
    prefill_tokens: Annotated[int, typer.Option(help="Leave prefill out where batch x context is more.")] = 4096,
    memory: Annotated[str, typer.Option(help="Also say how many sequences fit in this much: 80GiB.")] = "",
    engine: Annotated[
        str | None,
        typer.Option(
            help="Time decoding in an engine instead, each model in a process of its own: transformers, vllm, "
            "llama.cpp, openvino, ctranslate2.",
            **one_of("--engine", lambda: ENGINES),
        ),
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option(help="Python of the environment that has the engine. (default: this one)")
    ] = None,
    cache_memory: Annotated[
        str,
        typer.Option(help="In an engine: also time as many requests at a time as this much cache holds: 256MiB."),
    ] = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    json: AsJson = False,
    out: SaveTo = None,
) -> None:
    """Measure how much faster and smaller a converted model decodes, and where it does not."""
    from gqa_convert.budget.counts import parse_bytes, parse_counts, parse_single
    from gqa_convert.evaluate.decode.settings import BenchSettings

    settings = BenchSettings(
        batches=parse_counts(batch, "--batch"),
        contexts=parse_counts(cache_context, "--cache-context"),
        caches=tuple(part.strip() for part in cache.split(",")),
        mode=mode,
        steps=steps,
        rounds=rounds,
        prefill_tokens=prefill_tokens,
        memory=parse_bytes(memory, "--memory") if memory else None,
        source_tokens=parse_single(source_tokens, "--source-tokens") if source_tokens else None,
        cache_memory=parse_bytes(cache_memory, "--cache-memory") if cache_memory else None,
    )
    from gqa_convert.cli import show_bench

    if engine:
        own = {"--cache": cache != _CACHES, "--mode": mode != "eager", "--memory": memory, "--device": device != "auto"}
        own["--source-tokens"] = source_tokens
        for flag, given in own.items():
            if given:
                raise UsageError(f"{flag}: an engine has its own way; it cannot be set together with --engine.")
        from gqa_convert.evaluate.engines.bench import bench_engine

        with Counter("points", quiet=json) as progress:
            progress.total(len(settings.batches) * len(settings.contexts))
            measured = bench_engine(
                [located(base, revision), *(converted or [])], engine, settings, python=engine_python, dtype=dtype,
                trust_remote_code=trust_remote_code, on_point=lambda point: progress.advance(),
            )  # fmt: skip
        save(measured.to_json(), out)
        emit(measured.to_json(), json, lambda: show_bench.show_bench(measured))
        return
    for flag, given in {"--engine-python": engine_python, "--cache-memory": cache_memory}.items():
        if given:
            raise UsageError(f"{flag}: goes with --engine.")
    from gqa_convert.evaluate.decode.bench import bench
    from gqa_convert.evaluate.decode.contender import load_contenders

    contenders = load_contenders(
        [located(base, revision), *(converted or [])], dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    with Counter("points", quiet=json) as progress:
        progress.total(len(settings.batches) * len(settings.contexts) * len(settings.caches))
        measured = bench(contenders, settings, on_point=lambda point: progress.advance())
    save(measured.to_json(), out)
    emit(measured.to_json(), json, lambda: show_bench.show_bench(measured))


def sweep_command(
    model: Base,
    groups: Annotated[str, typer.Option("--groups", "-g", help="KV-head counts: a list.")] = "",
    kv_budget: Annotated[
        str,
        typer.Option(
            help="Sizes of the KV cache, a list, each spent where layers need it: 50%, groups=2, 12KiB per token."
        ),
    ] = "",
    methods: Annotated[str, typer.Option(help="Merge methods or presets: a list; see `gqa methods`.")] = "mean",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder, new or to go on with. (default: MODEL-sweep here)"),
    ] = None,
    data: Data = None,
    tolerance: Annotated[float, typer.Option(help="Loss rise that is acceptable, in nats per token.")] = 0.05,
    calibrate: Calibrate = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit each layer to the original's after merging.")] = False,
    allow_slow: AllowSlow = False,
    uptrain_tokens: Annotated[int, typer.Option(help="Uptrain every point on so many tokens first.", min=0)] = 0,
    uptrain_config: Annotated[
        Path | None, typer.Option(help="YAML of the uptraining (as for `gqa uptrain`): data, schedule, batch.")
    ] = None,
    benchmark: Annotated[bool, typer.Option("--bench/--no-bench", help="Also time decoding.")] = True,
    batch: Annotated[str, typer.Option(help="Batches of the decode benchmark: a list.")] = "8",
    cache_context: Annotated[str, typer.Option(help="Contexts of the decode benchmark: a list.")] = "2k",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity/--no-sensitivity", help="Also measure the cost of each layer alone.")
    ] = True,
    keep_models: Annotated[
        bool, typer.Option("--keep-models/--no-keep-models", help="Keep the converted folders.")
    ] = True,
    field: Field = "text",
    separator: Separator = "",
    context: Context = None,
    stride: Stride = None,
    max_windows: MaxWindows = MOST_WINDOWS,
    special: Special = True,
    eos: Eos = True,
    batch_size: BatchSize = 8,
    samples: Samples = 2,
    quantised_cache: QuantisedCache = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    json: AsJson = False,
) -> None:
    """Convert by every method to every number of groups, measure each, and recommend one. Goes on where it stopped."""
    data = held_out(data, model)
    variants = tuple(part.strip() for part in methods.split(","))
    for variant in variants:
        check_choice("--methods", variant, [*PRESETS, *all_methods()])
    from gqa_convert.budget.counts import parse_counts
    from gqa_convert.cli import show_sweep
    from gqa_convert.evaluate.decode.settings import BenchSettings
    from gqa_convert.evaluate.evaluation import EvalSettings
    from gqa_convert.evaluate.sweep.run import sweep
    from gqa_convert.evaluate.sweep.settings import SweepSettings

    timing = BenchSettings(
        batches=parse_counts(batch, "--batch"),
        contexts=parse_counts(cache_context, "--cache-context"),
        caches=("static",),
        prefill_tokens=0,
    )
    settings = SweepSettings(
        groups=parse_counts(groups, "--groups") if groups else (),
        budgets=named_list(kv_budget),
        variants=variants,
        evaluation=EvalSettings(
            data=data,
            field=field,
            separator=separator,
            context=context,
            stride=stride,
            max_windows=max_windows or None,
            special=special,
            eos=eos,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            caches=named_list(quantised_cache),
            samples=samples,
        ),
        benchmark=timing if benchmark else None,
        tolerance=tolerance,
        allow_slow=allow_slow,
        calibrate=calibrate,
        refit=refit,
        sensitivity=sensitivity,
        keep_models=keep_models,
        uptrain_tokens=uptrain_tokens,
        uptrain_config=uptrain_config,
    )
    folder = out or Path(f"{Path(model).name}-sweep")
    model = located(model, revision)
    with Counter("points", quiet=json) as progress:

        def report(point: Any, known: bool) -> None:
            progress.advance()
            progress.say(show_sweep.point_line(point, known))

        finished = sweep(model, folder, settings, on_point=report, on_total=progress.total)
    emit(finished.to_json(), json, lambda: show_sweep.show_sweep(finished))


def located(model: str, revision: str | None) -> str:
    """The model, or the folder of its revision on the hub."""
    if revision is None:
        return model
    from gqa_convert.checkpoint.hub import resolve_model

    return str(resolve_model(model, revision=revision))
