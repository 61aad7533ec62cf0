"""Tables of what was measured, and progress while it is. Imports no torch."""

from __future__ import annotations

from rich.table import Table

from gqa_convert.console import console, size
from gqa_convert.evaluate.results import Comparison, Evaluation, ModelResult

_SECONDS_BETWEEN_LINES = 60.0
_MODELS_A_TABLE = 4
_ROWS = (
    "KV heads",
    "parameters",
    "cache per token",
    "loss",
    "perplexity",
    "bits per byte",
    "loss rise",
    "",
    "KL",
    "top-1 agreement",
)


def show_evaluation(found: Evaluation) -> None:
    """Print an evaluation: figures as rows, models as columns, so that it fits a narrow terminal."""
    out = console()
    shown = list(found.converted)
    for start in range(0, max(len(shown), 1), _MODELS_A_TABLE):
        out.print(_evaluation_table(found.base, shown[start : start + _MODELS_A_TABLE]))
    out.print(
        f"{found.task} on {found.data}: {found.tokens:,} tokens ({size(found.bytes)} of text) in {found.windows:,} "
        f"windows of {found.context}, one every {found.stride}; {found.dtype} on {found.device}. Loss and KL in nats "
        "per token; [ ]: 95 % bootstrap interval; KL(original || converted); top-1: same most likely token.",
        highlight=False,
        style="dim",
    )
    for name, scores in found.tasks.items():
        for task, metrics in scores.items():
            out.print(f"{name}  {task}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def _evaluation_table(base: ModelResult, shown: list[Comparison]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for model in (base, *(made.model for made in shown)):
        table.add_column(model.name, justify="right", overflow="fold")
    columns = [[*_own(base), "", "", "", ""]] + [_own(made.model) + _against(made) for made in shown]
    for label, values in zip(_ROWS, zip(*columns, strict=True), strict=True):
        table.add_row(label, *values)
    return table


def _own(model: ModelResult) -> list[str]:
    return [
        f"{model.kv_heads} of {model.query_heads}",
        f"{model.parameters:,}",
        size(model.kv_cache_bytes_per_token),
        f"{model.loss:.4f}",
        f"{model.perplexity:.2f}" if model.perplexity < 1e6 else f"{model.perplexity:.2e}",
        f"{model.bits_per_byte:.4f}" if model.bits_per_byte is not None else "-",
    ]


def _against(made: Comparison) -> list[str]:
    low, high = made.loss_difference_interval
    return [
        f"{made.loss_difference:+.4f}",
        f"[{low:+.4f}, {high:+.4f}]",
        f"{made.kl:.4f}",
        f"{made.top1_agreement:.1%}",
    ]
