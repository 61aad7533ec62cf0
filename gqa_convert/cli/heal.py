"""`gqa heal`: train a converted model back to its original's predictions, its attention or all of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gqa_convert.cli.options import AsJson, DryRun, Force, Trust
from gqa_convert.cli.running import emit
from gqa_convert.errors import UsageError

if TYPE_CHECKING:
    from gqa_convert.conversion.plan import ConvertPlan
    from gqa_convert.uptrain.heal import HealOptions, HealResult

HEAL = "heal"
"""The preset that converts by `best` and heals the result."""

Tokens = Annotated[
    str | None, typer.Option("--tokens", help="Tokens to train on at most: 200k, 1M. (default: 500k)", metavar="COUNT")
]
Until = Annotated[
    float | None,
    typer.Option(help="Stop when the held-out loss is so many nats per token from the original's.", metavar="NATS"),
]


def heal_command(
    converted: Annotated[str, typer.Argument(help="The converted folder.", metavar="CONVERTED")],
    original: Annotated[
        str, typer.Argument(help="The model before conversion: a folder, a hub id, or `demo`.", metavar="ORIGINAL")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="As for --calibrate. Repeated, sources are mixed, evenly or by weight. "
            "(default: self, the original writes it)",
            metavar="DATA[=WEIGHT]",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Text to measure on. (default: a fiftieth of the documents of --text)", metavar="DATA"),
    ] = None,
    tokens: Tokens = None,
    until: Until = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; of an encoder-decoder a share of each matrix's size. (default: by width, or 3e-4)"
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence. (default: 512)")] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            help="What is trained: attention, or all (slower; a little nearer). (default: attention)", metavar="WHAT"
        ),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers", help="Of an encoder-decoder: the original answers --text first, and that is trained on."
        ),
    ] = False,
    copies: Annotated[
        float | None,
        typer.Option(
            help="Share of the tokens that are passages of --text which come back, to learn copying. (default: 0)",
            metavar="SHARE",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the text. (default: 0)")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep the training run here. (default: beside --out, removed at the end)")
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
    json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Heal CONVERTED: distil ORIGINAL into its attention on a little text, and write the result to --out.

    Stopped (SIGTERM, SIGUSR1, a power cut), the same command goes on where it was. Works under `accelerate launch -m
    gqa_convert.cli heal ...` on any number of devices.
    """
    from gqa_convert.budget.counts import parse_count
    from gqa_convert.uptrain.heal import HealOptions, foreseen, heal, told

    given: dict[str, Any] = {
        "text": None if not text else text[0] if len(text) == 1 else tuple(text),
        "held_out": held_out,
        "tokens": None if tokens is None else parse_count(tokens),
        "until": until,
        "rate": rate,
        "context": context,
        "parameters": parameters,
        "answers": answers or None,
        "copies": copies,
        "seed": seed,
    }
    options = HealOptions(**{name: value for name, value in given.items() if value is not None})
    if dry_run:
        cost = foreseen(converted, original, options, trust_remote_code=trust_remote_code)
        emit(asdict(cost), json, lambda: typer.echo(told(cost, options.tokens)))
        return
    result = heal(
        converted,
        original,
        out=out,
        options=options,
        work=work,
        force=force,
        trust_remote_code=trust_remote_code,
        quiet=json,
        tell=None if json else say,
    )
    show_healed(result, json)


def heal_options(
    preset: str | None, calibrate: str | None, tokens: str | None, until: float | None, seed: int | None
) -> HealOptions | None:
    """The healing that `--preset heal` asks for; None for another preset.

    Raises:
        UsageError: if its options are given without it.
    """
    if preset != HEAL:
        if tokens is not None or until is not None:
            raise UsageError("--heal-tokens, --heal-until: belong to --preset heal, which was not asked for.")
        return None
    from gqa_convert.budget.counts import parse_count
    from gqa_convert.uptrain.heal import HealOptions

    given: dict[str, Any] = {
        "text": calibrate,
        "tokens": None if tokens is None else parse_count(tokens),
        "until": until,
        "seed": seed,
    }
    return HealOptions(**{name: value for name, value in given.items() if value is not None})


def convert_healed(
    planned: ConvertPlan,
    options: HealOptions,
    *,
    work: Path | None,
    force: bool,
    flush: bool,
    verify: str,
    trust_remote_code: bool,
    json: bool,
) -> None:
    """Carry a plan out, heal the result, and print what both brought."""
    from gqa_convert.progress import conversion_progress
    from gqa_convert.uptrain.heal import convert_and_heal

    with conversion_progress(planned.bytes_out, quiet=json) as (on_bytes, on_layer):
        result = convert_and_heal(
            planned,
            options=options,
            work=work,
            force=force,
            flush=flush,
            verify=verify,
            trust_remote_code=trust_remote_code,
            quiet=json,
            tell=None if json else say,
            on_bytes=on_bytes,
            on_layer=on_layer,
        )
    show_healed(result, json)


def say(text: str) -> None:
    """Print a line, by the first process of several."""
    from gqa_convert.console import console
    from gqa_convert.uptrain.heal import is_main

    if is_main():
        console().print(text, highlight=False, markup=False)


def show_healed(result: HealResult, json: bool) -> None:
    """Print what healing brought."""
    from gqa_convert.console import console, show_written
    from gqa_convert.uptrain.heal import is_main

    if not is_main():
        return
    if json:
        emit({**asdict(result), "out": str(result.out)}, True, lambda: None)
        return
    say(
        f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f} nats per token; the original's is "
        f"{result.loss_original:.4f} ({result.tokens:,} tokens, {result.seconds:,.0f} s in steps)"
    )
    show_written(console(), result.out)
