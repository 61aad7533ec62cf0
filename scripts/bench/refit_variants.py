#!/usr/bin/env python3
"""Try other ways to refit merged layers than the package's: the loss of `best` with one thing changed.

    python scripts/bench/refit_variants.py MODEL --data HELD_OUT --calibrate TEXT --groups 2,1 --out FILE

Every variant converts the model by `best` with one part of the refit replaced, and is evaluated like `merge_quality.py`
does. Written row by row; started again with the same `--out`, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import merge_quality


@contextmanager
def as_it_is() -> Iterator[None]:
    """Change nothing."""
    yield


@contextmanager
def learning_rate(factor: float) -> Iterator[None]:
    """Train with another peak learning rate."""
    from gqa_convert.calibrate import refit
    from gqa_convert.calibrate.descent import DescentOptions

    share = DescentOptions().relative_lr * factor
    with patch.object(refit, "DescentOptions", partial(DescentOptions, relative_lr=share)):
        yield


@contextmanager
def inputs_of_the_original() -> Iterator[None]:
    """Fit each layer to what the original's layer is given, not to what the converted model gives it."""
    from gqa_convert.calibrate import session
    from gqa_convert.calibrate.layer import refit_layer as real

    def refit_layer(
        blocks: Any, records: Any, source: Any, student: Any, shadow: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return real(blocks, records, source, student, replace(shadow, calls=source.calls), *args, **kwargs)

    with patch.object(session, "refit_layer", refit_layer):
        yield


@contextmanager
def what_the_stream_lacks() -> Iterator[None]:
    """Fit each layer to the original's output plus what earlier layers lost."""
    from gqa_convert.calibrate import session
    from gqa_convert.calibrate.layer import corrected
    from gqa_convert.calibrate.layer import refit_layer as real

    def refit_layer(
        blocks: Any, records: Any, source: Any, student: Any, shadow: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for names in blocks:
            record = records[names.module]
            record.outputs[:] = corrected(record.outputs, source, shadow, names)
        return real(blocks, records, source, student, shadow, *args, **kwargs)

    with patch.object(session, "refit_layer", refit_layer):
        yield


@contextmanager
def least_squares_afterwards() -> Iterator[None]:
    """Solve for o_proj once the steps are done."""
    from gqa_convert.calibrate import session

    real = session.refit_options

    def refit_options(recipe: Any) -> Any:
        options = real(recipe)
        return options and replace(options, least_squares=True)

    with patch.object(session, "refit_options", refit_options):
        yield


@contextmanager
def tokens_alike() -> Iterator[None]:
    """Count every calibration token alike, not by the attention that it receives."""
    from gqa_convert.calibrate import session
    from gqa_convert.calibrate.attention_received import attention_received

    with patch.object(session, "attention_received", lambda modules: attention_received(())):
        yield


@contextmanager
def statistics_of_the_converted() -> Iterator[None]:
    """Take each layer's statistics on what the converted model gives it, not on what the original gives it."""
    from gqa_convert.calibrate.session import Session

    one_layer, observe = Session._one_layer, Session._observe
    shadows: list[Any] = []

    def with_shadow(self: Any, index: int, window: Any, student: Any, shadow: Any) -> None:
        shadows[:] = [shadow]
        one_layer(self, index, window, student, shadow)

    def on_both(self: Any, index: int, window: Any) -> Any:
        observe(self, index, replace(window, calls=shadows[0].calls))  # these moments are kept
        return observe(self, index, window)

    with patch.object(Session, "_one_layer", with_shadow), patch.object(Session, "_observe", on_both):
        yield


Variant = tuple[Callable[[], Any], dict[str, Any]]
O_PROJ = {"preset": "fast", "refit": True, "refit_steps": 0}
VARIANTS: dict[str, Variant] = {
    "best": (as_it_is, {}),
    "100 steps": (as_it_is, {"refit_steps": 100}),
    "1000 steps": (as_it_is, {"refit_steps": 1000}),
    "half the learning rate": (partial(learning_rate, 0.5), {}),
    "twice the learning rate": (partial(learning_rate, 2.0), {}),
    "inputs of the original": (inputs_of_the_original, {}),
    "what the stream lacks": (what_the_stream_lacks, {}),
    "least squares afterwards": (least_squares_afterwards, {}),
    "contiguous groups": (as_it_is, {"grouping": "contiguous"}),
    "fast": (as_it_is, {"preset": "fast"}),
    "fast: tokens alike": (tokens_alike, {"preset": "fast"}),
    "best: tokens alike": (tokens_alike, {}),
    "best: statistics of the converted model": (statistics_of_the_converted, {}),
    "fast + o_proj": (as_it_is, O_PROJ),
    "fast + o_proj: tokens alike": (tokens_alike, O_PROJ),
    "fast + o_proj: statistics of the converted model": (statistics_of_the_converted, O_PROJ),
    "from the mean": (as_it_is, {"method": "mean", "fold": False, "grouping": "contiguous"}),
}


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="demo", help="held-out text to measure on")
    parser.add_argument("--calibrate", required=True, help="text to calibrate on, other than the held-out")
    parser.add_argument("--groups", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--context", type=int, help="tokens per window")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--variants", type=lambda text: text.split(","), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    from gqa_convert.evaluate.evaluation import EvalSettings
    from gqa_convert.evaluate.models import subject

    settings = EvalSettings(
        data=args.data, context=args.context, stride=args.context, max_windows=args.max_windows, batch_size=32
    )
    base = str(subject(args.model).folder)
    if args.calibrate == "demo":
        args.calibrate = str(merge_quality.demo_text(Path(tempfile.mkdtemp())))
    kept: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    table: dict[str, dict[str, Any]] = kept.get("rows", {})
    for name in args.variants or VARIANTS:
        for groups in args.groups:
            if str(groups) in table.get(name, {}):
                continue
            point, evaluation = one(base, name, groups, args.calibrate, settings)
            table.setdefault(name, {})[str(groups)] = point
            print(f"{name:48s} {groups:3d} groups  {point['increase']:+.4f} nats", flush=True)
            if args.out:
                args.out.write_text(json.dumps(merge_quality.described(args, table, evaluation), indent=1) + "\n")


def one(base: str, name: str, groups: int, calibrate: str, settings: Any) -> tuple[dict[str, Any], Any]:
    """Convert by one variant and evaluate it."""
    from gqa_convert import convert
    from gqa_convert.conversion.recipe import make_recipe
    from gqa_convert.evaluate.evaluation import evaluate

    change, chosen = VARIANTS[name]
    recipe = make_recipe(**{"preset": "best", "calibrate": calibrate, **chosen})
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        with change():
            convert(base, groups=groups, out=Path(folder) / "converted", recipe=recipe)
        worked = time.process_time() - started
        evaluation = evaluate(base, [Path(folder) / "converted"], settings)
    seen = evaluation.converted[0]
    point = {
        "increase": seen.loss_difference,
        "interval": list(seen.loss_difference_interval),
        "kl": seen.kl,
        "top1": seen.top1_agreement,
        "processor_seconds": round(worked, 1),
        "recipe": recipe.to_json(),
    }
    return point, evaluation


if __name__ == "__main__":
    main()
