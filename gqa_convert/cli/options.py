"""Each option that several commands have, spelled once; and how a command's result goes out."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

SETTINGS = {"help_option_names": ["-h", "--help"]}
"""Of every command."""

Model = Annotated[str, typer.Argument(help="A checkpoint folder or a Hugging Face hub id.", metavar="MODEL")]
Base = Annotated[
    str, typer.Argument(help="The model before conversion: a folder, a hub id, or `demo`.", metavar="BASE")
]
Converted = Annotated[
    list[str] | None, typer.Argument(help="Conversions of it: folders or hub ids.", metavar="CONVERTED...")
]

Groups = Annotated[
    int, typer.Option("--groups", "-g", help="KV heads after the conversion (GQA-8 is 8; 1 is multi-query attention).")
]
AnyGroups = Annotated[
    int | None,
    typer.Option("--groups", "-g", help="KV heads after the conversion (GQA-8 is 8; 1 is multi-query attention)."),
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
        "refitted; heal: best, then distilled from the original (`gqa heal`)."
    ),
]
Method = Annotated[str | None, typer.Option(help="How heads are merged; `gqa methods` lists them. (default: mean)")]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling and of random heads. (default: 0)")]
Grouping = Annotated[
    str | None,
    typer.Option(help="contiguous: adjacent heads; search: equal groups of least residual. (default: contiguous)"),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        help="Text to measure layers on: a file, a folder, a hub dataset `id:configuration:split` (the last two may be "
        "left out), `demo` (this Python's own modules), or `self` (sampled from the model).",
        metavar="DATA",
    ),
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
        help="none; structure: keys, shapes, config against the target model; logits: also run both models (in memory)."
    ),
]
Route = Annotated[
    str,
    typer.Option(
        help="For families without a KV-head setting. native: write another stock family that computes the same; "
        "remote-code: ship modelling code; auto: native where that is exact."
    ),
]
AllowSlow = Annotated[
    bool,
    typer.Option("--allow-slow", help="Also convert families whose cache shrinks but that decode no faster (BLOOM)."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]

Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="Held-out text: a file, a folder, a hub dataset `id:configuration:split` (the last two may be left out; "
        "split `test` by default), or `demo` (the package's own held-out text).",
    ),
]
Field = Annotated[str, typer.Option(help="Key of a .jsonl line that holds the text.")]
Separator = Annotated[str, typer.Option(help="What stands between the documents of a plain text file.")]
Context = Annotated[int | None, typer.Option(help="Tokens per window. (default: the model's own, at most 2048)")]
Stride = Annotated[
    int | None, typer.Option(help="Tokens from one window to the next; CONTEXT: side by side. (default: half of it)")
]
MaxWindows = Annotated[int | None, typer.Option(help="Score only this many windows, evenly spread.")]
Special = Annotated[bool, typer.Option("--special/--no-special", help="Let the tokenizer add BOS and the like.")]
Eos = Annotated[bool, typer.Option("--eos/--no-eos", help="End every document with EOS.")]
BatchSize = Annotated[int, typer.Option(help="Windows run at a time.", min=1)]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's own on a GPU, else float32), float32, bfloat16, float16.")
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


def emit(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result: as JSON, or as `show` does."""
    if as_json:
        typer.echo(jsonlib.dumps(value, indent=2))
    else:
        show()


def save(value: Any, out: Path | None) -> None:
    """Write a result as JSON where `out` names a file."""
    if out is None:
        return
    from gqa_convert.evaluate.files import write_json

    write_json(out, value)
