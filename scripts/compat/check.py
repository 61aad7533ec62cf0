"""What the package must do with the libraries of this environment: prints `ok`, or the error, for each as JSON.

    python scripts/compat/check.py [PACKAGE ...]    # packages whose versions are recorded

The model that comes with the package and a tiny T5 with its modelling file: nothing is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def main() -> None:
    """Run every check, whatever became of those before it."""
    checks: dict[str, Callable[[Path], None]] = {
        "command": command,
        "convert, verify logits": converts,
        "load": loads,
        "evaluate": evaluates,
        "fast": fast,
        "heal": heals,
        "stop and go on": goes_on,
        "encoder-decoder with its modelling file": ships_code,
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, check in checks.items():
            try:
                check(Path(folder))
                results[name] = "ok"
            except Exception as error:
                results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    results["installed"] = {name: _version(name) for name in sys.argv[1:]}
    print(json.dumps(results))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def command(folder: Path) -> None:
    """`gqa --version` answers."""
    subprocess.run([str(Path(sys.executable).with_name("gqa")), "--version"], check=True, capture_output=True)


def converts(folder: Path) -> None:
    """The embedded model by mean, and both models run."""
    import gqa_convert

    gqa_convert.convert("demo", groups=2, out=folder / "mean", verify="logits")


def loads(folder: Path) -> None:
    """Stock transformers loads the result and writes with it."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "mean")
    assert model.config.num_key_value_heads == 2
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)


def evaluates(folder: Path) -> None:
    """Held-out loss of both."""
    import gqa_convert

    evaluation = gqa_convert.evaluate("demo", folder / "mean", data="demo", context=64, stride=64, max_windows=2)
    assert evaluation.converted[0].loss_difference > 0


def fast(folder: Path) -> None:
    """Calibrated pca of searched groups, on little text, better than the mean."""
    import gqa_convert
    from gqa_convert.conversion.recipe import make_recipe

    recipe = make_recipe("fast", calibrate="demo", sequences=8)
    gqa_convert.convert("demo", groups=2, out=folder / "fast", recipe=recipe)
    folders = [folder / "mean", folder / "fast"]
    evaluation = gqa_convert.evaluate("demo", folders, data="demo", context=64, stride=64, max_windows=4)
    mean, pca = (each.loss_difference for each in evaluation.converted)
    assert pca < mean, f"{pca} is not below {mean}"


def heals(folder: Path) -> None:
    """Four steps of distillation from the original, by Muon, with hidden states: the loss falls."""
    from gqa_convert.uptrain.heal import HealOptions, heal

    options = HealOptions(text="demo", held_out="demo", tokens=4096)
    result = heal(folder / "fast", "demo", out=folder / "healed", options=options, quiet=True)
    assert result.loss_after < result.loss_before, f"{result.loss_after} is not below {result.loss_before}"


def goes_on(folder: Path) -> None:
    """Uptraining that ended after two steps goes on from its checkpoint to four."""
    from gqa_convert.uptrain.loop import uptrain
    from gqa_convert.uptrain.read_config import parse_config

    values: dict[str, Any] = {
        "model": str(folder / "mean"),
        "output": str(folder / "run"),
        "data": {"source": {"kind": "python", "paths": ["gqa_convert.data.stdlib:held_out_texts"]}, "context": 64},
        "schedule": {"peak": 1e-3, "kind": "constant"},
        "train": {"batch_sequences": 2, "precision": "float32"},
        "evaluation": {"tokens": 256},
        "log": {"trackers": []},
    }
    for steps in (2, 4):
        result = uptrain(parse_config(values | {"budget": {"steps": steps}}), quiet=True)
    assert result.tokens == 4 * 2 * 64, result.tokens


def ships_code(folder: Path) -> None:
    """A tiny T5 converts, and its modelling file loads and runs without this package."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    import gqa_convert

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    sizes["decoder_start_token_id"] = 0
    config = T5Config(**sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    gqa_convert.convert(folder / "t5", groups=2, out=folder / "t5-gqa")
    code = (
        "import sys, torch; from transformers import AutoModelForSeq2SeqLM as A;"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "m.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "t5-gqa")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
