"""The demo: convert the embedded checkpoint by the paper's mean and by the better presets, uptrain the best of them a
little, and show what is saved and what it costs.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from gqa_convert.checkpoint.embedded import CHECKPOINT
from gqa_convert.console import plain_console
from gqa_convert.data import stdlib
from gqa_convert.demo.recovery import Uptrained, uptrain_for
from gqa_convert.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of the file at path.
'''
NEW_TOKENS = 64
UPTRAIN_SECONDS = 60.0
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"calibrate": "demo", "sequences": 64, "length": 256},
    "best": {"calibrate": "demo", "sequences": 64, "length": 256, "refit_steps": 100, "refit_tokens": 1024},
}
"""Presets shown beside the mean, the best one last, cut to what a demonstration may take."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's showing: held-out loss in nats per token, KV-cache bytes per token, a greedy continuation."""

    held_out_loss: float
    kv_cache_bytes_per_token: int
    continuation: str


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo did.

    `out` is None when the models were made in a temporary folder and are gone; else it holds the last of the
    conversions. `after` is the showing of the mean, `presets` that of each better preset by name. `recovered` is the
    uptrained model's showing and `uptrained` what its training took, both None where there was nothing to win back or
    it was left out.
    """

    out: Path | None
    heads: int
    groups: int
    before: Measured
    after: Measured
    presets: dict[str, Measured]
    recovered: Measured | None
    uptrained: Uptrained | None
    prompt: str
    held_out_modules: int
    held_out_windows: int
    window_tokens: int
    verified: str
    seconds: float

    @property
    def loss_rise(self) -> float:
        """Held-out loss added by the paper's conversion, in nats per token."""
        return self.after.held_out_loss - self.before.held_out_loss

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        values = asdict(self) | {"out": None if self.out is None else str(self.out), "loss_rise": self.loss_rise}
        if self.uptrained is not None:
            values["uptrained"]["folder"] = None if self.out is None else str(self.uptrained.folder)
        return values


def run_demo(
    out: Path | None = None, groups: int = 2, uptrain_seconds: float = UPTRAIN_SECONDS, json: bool = False
) -> DemoResult:
    """Convert the embedded checkpoint, verify it, uptrain it a little, measure all and print the comparison.

    Args:
        out: folder for the best converted model; by default a temporary one, removed at the end. The uptrained model
            goes to `<out>-uptrained`.
        groups: KV heads after the conversion.
        uptrain_seconds: about how long to uptrain; 0 leaves it out.
        json: print one JSON object instead of tables.

    Raises:
        GQAConvertError: from the conversion, or where no standard-library source is found to measure on.
    """
    console = plain_console()
    with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="gqa-demo-") as name:
        result = _demo(Path(name), out, groups=groups, seconds=uptrain_seconds, quiet=json)
    if json:
        console.print_json(dumps(result.to_json()))
    else:
        _show(result, console)
    return result


def held_out_windows(tokenizer: Any, *, length: int) -> tuple[Tensor, int]:
    """Return windows of this Python's held-out modules (ids_BT) and how many modules they come from."""
    from gqa_convert.demo.loss import encode_documents, sample_windows

    _, held_out = stdlib.split(stdlib.collect())
    stream = encode_documents((module.text() for module in held_out), tokenizer)
    return sample_windows(stream, length=length), len(held_out)


def _demo(work: Path, out: Path | None, *, groups: int, seconds: float, quiet: bool) -> DemoResult:
    from transformers import AutoConfig, AutoTokenizer

    from gqa_convert.conversion.execute import convert
    from gqa_convert.conversion.recipe import make_recipe

    started = time.monotonic()
    target = work / "converted" if out is None else out
    beside = target.absolute().with_name(target.absolute().name + "-uptrained")
    if beside.exists():
        raise OutputError(f"--out: {beside} is there already. Choose another folder.")
    config = AutoConfig.from_pretrained(CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    names = list(PRESETS) if groups < config.num_attention_heads else []
    folders = {name: target if name == names[-1] else work / name for name in names}
    mean = convert(CHECKPOINT, groups=groups, out=work / "mean" if names else target, verify="logits")
    for name, folder in folders.items():
        convert(CHECKPOINT, groups=groups, out=folder, recipe=make_recipe(name, **PRESETS[name]))
    ids_BT, modules = held_out_windows(tokenizer, length=config.max_position_embeddings)
    cache_after = mean.plan.kv_cache_bytes_per_token_after
    before = _measure(CHECKPOINT, tokenizer, ids_BT, mean.plan.kv_cache_bytes_per_token_before)
    after = _measure(mean.out, tokenizer, ids_BT, cache_after)
    presets = {name: _measure(folder, tokenizer, ids_BT, cache_after) for name, folder in folders.items()}
    uptrained = recovered = None
    if seconds > 0 and names:
        uptrained = uptrain_for(target, work, seconds=seconds, quiet=quiet)
        recovered = _measure(uptrained.folder, tokenizer, ids_BT, cache_after)
        if out is not None:
            uptrained = replace(uptrained, folder=Path(shutil.move(uptrained.folder, beside)))
    return DemoResult(
        out=out,
        heads=config.num_attention_heads,
        groups=groups,
        before=before,
        after=after,
        presets=presets,
        recovered=recovered,
        uptrained=uptrained,
        prompt=PROMPT,
        held_out_modules=modules,
        held_out_windows=len(ids_BT),
        window_tokens=ids_BT.shape[1],
        verified=mean.verified,
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
    shown = [("before", result.before), ("mean", result.after), *result.presets.items()]
    shown += [("uptrained", result.recovered)] if result.recovered is not None else []
    table = Table(title=f"The embedded checkpoint, {result.heads} KV heads to {result.groups}")
    table.add_column("")
    for when, _ in shown:
        table.add_column(when, justify="right")
    table.add_row("held-out loss, nats per token", *(f"{m.held_out_loss:.3f}" for _, m in shown))
    rises = [f"{m.held_out_loss - result.before.held_out_loss:+.3f}" for _, m in shown[1:]]
    table.add_row("  more than before", "", *rises)
    table.add_row("KV cache, bytes per token", *(f"{m.kv_cache_bytes_per_token:,}" for _, m in shown))
    console.print(table)
    for when, measured in shown:
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
            "Converting raises the loss: heads merged into one are not the heads the model was trained with. The mean "
            "is the paper's; the presets fast and best (here with little text and few steps) lose less. Uptraining, "
            "here from best, wins back more (the paper spends 5% of the pretraining on it)."
        )
    if result.uptrained is not None:
        done = result.uptrained
        lines.append(f"Uptrained here: {done.steps} steps, {done.tokens:,} tokens, {done.seconds:.0f} s.")
    if result.out is not None:
        lines.append(f"Converted model ({['mean', *result.presets][-1]}): {result.out}")
        if result.uptrained is not None:
            lines.append(f"Uptrained model: {result.uptrained.folder}")
    return "\n".join(lines)
