"""Each option that several commands have, spelled once, and checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from gqa_convert.checkpoint.dtypes import FLOAT_NAMES
from gqa_convert.checkpoint.embedded import DEMO
from gqa_convert.conversion.recipe import GROUPINGS, PRESETS, ROUTES, VERIFY_LEVELS
from gqa_convert.errors import UsageError, check_choice
from gqa_convert.merge.registry import all_methods


def one_of(flag: str, choices: Callable[[], Iterable[str]]) -> dict[str, Any]:
    """What an option with few values takes: a check before anything is imported, and words for shell completion."""

    def check(value: str | None) -> str | None:
        if value is not None:
            check_choice(flag, value, choices())
        return value

    return {"callback": check, "autocompletion": lambda: list(choices())}


def _dtype(value: str) -> str:
    if value.lower() not in FLOAT_NAMES:
        check_choice("--dtype", value, ["auto", *FLOAT_NAMES])
    return value


def _groups(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"--groups {value}: at least one KV head is needed; 1 is multi-query attention.")
    return value


Model = Annotated[str, typer.Argument(help="A checkpoint folder, a Hugging Face hub id, or `demo`.", metavar="MODEL")]
Base = Annotated[
    str, typer.Argument(help="The model before conversion: a folder, a hub id, or `demo`.", metavar="BASE")
]
Converted = Annotated[
    list[str] | None, typer.Argument(help="Conversions of it: folders or hub ids.", metavar="CONVERTED...")
]

Groups = Annotated[
    int,
    typer.Option(
        "--groups",
        "-g",
        help="KV heads after the conversion (GQA-8 is 8; 1 is multi-query attention).",
        callback=_groups,
    ),
]
AnyGroups = Annotated[
    int | None,
    typer.Option(
        "--groups",
        "-g",
        help="KV heads after the conversion (GQA-8 is 8; 1 is multi-query attention).",
        callback=_groups,
    ),
]
GroupsPerLayer = Annotated[
    str | None,
    typer.Option(
        help="KV heads of each decoder layer instead, first to last: `8,8,4,2`, or a JSON file with such a list. "
        "For Llama-like models and those that go with modelling code.",
        metavar="LIST",
    ),
]
KVBudget = Annotated[
    str | None,
    typer.Option(
        help="Find the KV heads of each layer within this size of the KV cache instead: `25%`, `groups=4` (the size "
        "that four in every layer would take), or bytes per token (`12KiB`). Measures every layer on --data.",
        metavar="SIZE",
    ),
]
KVCosts = Annotated[
    str,
    typer.Option(
        help="How --kv-budget finds what a layer costs: `measured`, a run of the model for each; or `estimated`, all "
        "from one backward pass.",
        metavar="HOW",
    ),
]
KeepLayers = Annotated[
    str, typer.Option(help="Layers that keep all their KV heads: `first,last`, `0,5`, `0-3`.", metavar="LAYERS")
]
TensorParallel = Annotated[
    int, typer.Option("--tp", help="Refuse a layer whose KV heads so many devices cannot share without copies.")
]
MinGroups = Annotated[int, typer.Option(help="Refuse a layer with fewer KV heads.")]
CrossGroups = Annotated[
    int | None, typer.Option(help="KV heads of cross-attention, where a model sets them apart. (default: as --groups)")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder to write. (default: MODEL-gqa<GROUPS> beside it)")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="paper: mean of adjacent heads; fast: calibrated pca of searched groups; best: fast, then layers "
        "refitted; heal: best, then distilled from the original (`gqa heal`).",
        **one_of("--preset", lambda: [*PRESETS, "heal"]),
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="How heads are merged; `gqa methods` lists them. (default: mean)", **one_of("--method", all_methods)
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling and of random heads. (default: 0)")]
Grouping = Annotated[
    str | None,
    typer.Option(
        help="contiguous: adjacent heads; search: equal groups of least residual. (default: contiguous)",
        **one_of("--grouping", lambda: GROUPINGS),
    ),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        help="Text to measure layers on: a file, a folder, a hub dataset `id:configuration:split` (the last two may be "
        "left out), `demo` (this Python's own modules), or `self` (sampled from the model).",
        metavar="DATA",
    ),
]
Samples = Annotated[
    int,
    typer.Option(help="Let every model go on from so many beginnings of the text, side by side.", min=0),
]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="Score a held-out sample before and after. (default: where that takes seconds and half the free memory)",
    ),
]
MeasuredOn = Annotated[
    str | None, typer.Option("--data", "-d", help="Held-out text for --measure. (default: text that the model writes)")
]
Force = Annotated[bool, typer.Option(help="Replace an earlier conversion at --out.")]
Verify = Annotated[
    str,
    typer.Option(
        help="none; structure: keys, shapes, config against the target model; logits: run both models (in memory) too.",
        **one_of("--verify", lambda: VERIFY_LEVELS),
    ),
]
Route = Annotated[
    str,
    typer.Option(
        help="For families without a KV-head setting. native: write another stock family that computes the same; "
        "remote-code: ship modelling code; auto: native where that is exact.",
        **one_of("--route", lambda: ROUTES),
    ),
]
AllowSlow = Annotated[
    bool,
    typer.Option("--allow-slow", help="Also convert families whose cache shrinks but that decode no faster (BLOOM)."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="Held-out text: a file, a folder, a hub dataset `id:configuration:split` (the last two may be left out; "
        "split `test` by default), or `demo` (the package's own held-out text). (default: demo, for the "
        "model `demo` only)",
    ),
]
Field = Annotated[str, typer.Option(help="Key of a .jsonl line that holds the text.")]
Separator = Annotated[str, typer.Option(help="What stands between the documents of a plain text file.")]
Context = Annotated[int | None, typer.Option(help="Tokens per window. (default: the model's own, at most 2048)")]
Stride = Annotated[
    int | None, typer.Option(help="Tokens from one window to the next; CONTEXT: side by side. (default: half of it)")
]
MaxWindows = Annotated[int, typer.Option(help="Score at most so many windows, evenly spread; 0: all.", min=0)]
MOST_WINDOWS = 128
"""Windows that are scored unless the user says otherwise: at most 128 x 2048 tokens."""
Special = Annotated[bool, typer.Option("--special/--no-special", help="Let the tokenizer add BOS and the like.")]
Eos = Annotated[bool, typer.Option("--eos/--no-eos", help="End every document with EOS.")]
QuantisedCache = Annotated[
    str,
    typer.Option(help="Also measure every model with its KV cache in fewer bits: fp8, int8, int4, a list."),
]
BatchSize = Annotated[int, typer.Option(help="Windows run at a time.", min=1)]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's own on a GPU, else float32), float32, bfloat16 or bf16, float16 or fp16.",
        callback=_dtype,
        autocompletion=lambda: ["auto", *FLOAT_NAMES],
    ),
]
ComputeDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="What is computed in: auto (float32), bfloat16 or bf16, float16 or fp16: less memory, less exact.",
        callback=_dtype,
        autocompletion=lambda: ["auto", *FLOAT_NAMES],
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
SaveTo = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON to this file.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from gqa_convert import __version__

        typer.echo(f"gqa-convert {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
]


def held_out(data: str | None, base: str) -> str:
    """The text to measure on: the user's, or the package's own for the package's own model.

    Raises:
        UsageError: if none is named, or what is named cannot be a file.
    """
    if data is None:
        if base != DEMO:
            raise UsageError(
                f"--data is missing: name held-out text such as {base} is used on (a .txt or .jsonl file, a folder, or "
                "a hub dataset)."
            )
        return DEMO
    if data.startswith(("/", "./", "../", "~")) and not Path(data).expanduser().exists():
        raise UsageError(f"--data {data}: does not exist.")
    return data


def named_list(given: str) -> tuple[str, ...]:
    """The names in `a,b`; none in an empty text."""
    return tuple(part.strip() for part in given.split(",") if part.strip())


def save(value: Any, out: Path | None) -> None:
    """Write a result as JSON where `out` names a file; as the reports read it, without the schema of `--json`."""
    if out is None:
        return
    from gqa_convert.evaluate.files import write_json

    write_json(out, value)
