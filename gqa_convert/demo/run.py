"""The demo: convert the embedded checkpoint, and show what conversion saves and what it costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from gqa_convert.demo import text

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The embedded default checkpoint: Llama architecture, 8 query heads with a KV head each."""

PROMPT = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of the file at path.
'''
NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's showing: held-out loss in nats per token, KV-cache bytes per token, a greedy continuation."""

    held_out_loss: float
    kv_cache_bytes_per_token: int
    continuation: str


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo did. `out` is None when the converted model was made in a temporary folder and is gone."""

    out: Path | None
    heads: int
    groups: int
    before: Measured
    after: Measured
    prompt: str
    held_out_modules: int
    held_out_windows: int
    window_tokens: int
    verified: str
    seconds: float

    @property
    def loss_rise(self) -> float:
        """Held-out loss added by the conversion, in nats per token."""
        return self.after.held_out_loss - self.before.held_out_loss

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self) | {"out": None if self.out is None else str(self.out), "loss_rise": self.loss_rise}


def run_demo(out: Path | None = None, groups: int = 2, json: bool = False) -> DemoResult:
    """Convert the embedded checkpoint, verify it, measure both models and print the comparison.

    Args:
        out: folder for the converted model; by default a temporary one, removed at the end.
        groups: KV heads after the conversion.
        json: print one JSON object instead of tables.

    Raises:
        GQAConvertError: from the conversion, or where no standard-library source is found to measure on.
    """
    console = Console()
    with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="gqa-demo-") as name:
        result = _demo(Path(name) / "converted" if out is None else out, groups=groups, kept=out is not None)
    if json:
        console.print_json(dumps(result.to_json()))
    else:
        _show(result, console)
    return result


def held_out_windows(tokenizer: Any, *, length: int) -> tuple[Tensor, int]:
    """Return windows of this Python's held-out modules (ids_BT) and how many modules they come from."""
    from gqa_convert.demo.loss import encode_documents, sample_windows

    _, held_out = text.split(text.collect())
    stream = encode_documents((module.text() for module in held_out), tokenizer)
    return sample_windows(stream, length=length), len(held_out)


def _demo(target: Path, *, groups: int, kept: bool) -> DemoResult:
    from transformers import AutoConfig, AutoTokenizer

    from gqa_convert.conversion import convert

    started = time.monotonic()
    converted = convert(CHECKPOINT, groups=groups, out=target, verify="logits")
    config = AutoConfig.from_pretrained(CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids_BT, modules = held_out_windows(tokenizer, length=config.max_position_embeddings)
    cache_before = converted.plan.kv_cache_bytes_per_token_before
    cache_after = converted.plan.kv_cache_bytes_per_token_after
    return DemoResult(
        out=converted.out if kept else None,
        heads=config.num_attention_heads,
        groups=groups,
        before=_measure(CHECKPOINT, tokenizer, ids_BT, cache_before),
        after=_measure(converted.out, tokenizer, ids_BT, cache_after),
        prompt=PROMPT,
        held_out_modules=modules,
        held_out_windows=len(ids_BT),
        window_tokens=ids_BT.shape[1],
        verified=converted.verified,
        seconds=round(time.monotonic() - started, 1),
    )


def _measure(folder: Path, tokenizer: Any, ids_BT: Tensor, cache_bytes: int) -> Measured:
    import torch
    from transformers import AutoModelForCausalLM

    from gqa_convert.demo.loss import model_loss

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id)
    continuation = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return Measured(
        held_out_loss=model_loss(model, ids_BT), kv_cache_bytes_per_token=cache_bytes, continuation=continuation
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _show(result: DemoResult, console: Console) -> None:
    before, after = result.before, result.after
    table = Table(title=f"The embedded checkpoint, {result.heads} KV heads to {result.groups}")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        "held-out loss, nats per token",
        f"{before.held_out_loss:.3f}",
        f"{after.held_out_loss:.3f}",
        f"{result.loss_rise:+.3f}",
    )
    share = after.kv_cache_bytes_per_token / before.kv_cache_bytes_per_token
    table.add_row(
        "KV cache, bytes per token",
        f"{before.kv_cache_bytes_per_token:,}",
        f"{after.kv_cache_bytes_per_token:,}",
        f"x {share:.2f}",
    )
    console.print(table)
    for when, measured in (("before", before), ("after", after)):
        code = Syntax(result.prompt + measured.continuation, "python", word_wrap=True, background_color="default")
        console.print(Panel(code, title=f"greedy continuation, {when}", title_align="left"))
    console.print(_closing(result))


def _closing(result: DemoResult) -> str:
    lines = [
        f"Verified ({result.verified}). Loss measured on {result.held_out_windows} windows of "
        f"{result.window_tokens} tokens from {result.held_out_modules} modules of this Python's standard library that "
        "the model was not trained on.",
    ]
    if result.groups < result.heads:
        lines.append(
            "The loss rises: heads merged into one are not the heads the model was trained with. Converting is only "
            "the first half; uptraining is what wins the loss back (the paper spends 5% of the pre-training on it)."
        )
    if result.out is not None:
        lines.append(f"Converted model: {result.out}")
    return "\n".join(lines)
