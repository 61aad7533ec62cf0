#!/usr/bin/env python3
"""Processor time of a conversion of a tiny model, over that of importing torch and the model's own code.

    python scripts/bench/start_up.py --out scripts/bench/results/start_up.json

Every round runs each command once, in turn; the ratios are within rounds, and their medians are what counts. Nothing
else should run meanwhile: processor time, too, grows on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

from measure import run

MAKE = (
    "import sys; from transformers import LlamaConfig, LlamaForCausalLM; "
    "LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, "
    "vocab_size=128, max_position_embeddings=64)).save_pretrained(sys.argv[1])"
)
IMPORTS = "import and nothing else"


def commands(model: str, out: str) -> dict[str, list[str]]:
    """The commands to compare, by name."""
    program = [str(Path(sys.executable).with_name("gqa-convert")), model, "--groups", "2", "--out", out, "--force"]
    return {
        IMPORTS: [sys.executable, "-c", "import torch, transformers.models.llama.modeling_llama"],
        "gqa-convert --no-measure": [*program, "--no-measure"],
        "gqa-convert": program,
        "gqa --help": [str(Path(sys.executable).with_name("gqa")), "--help"],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        run([sys.executable, "-c", MAKE, model])
        for number in range(options.rounds + 1):
            for name, command in commands(model, f"{folder}/out").items():
                measured = run(command)
                if number:  # the first round warms the page cache
                    seconds.setdefault(name, []).append(round(measured.cpu_s, 3))
    base = seconds[IMPORTS]
    result = {
        "what": "processor seconds of whole commands, and their ratio to the imports alone, round by round",
        "command": f"python scripts/bench/start_up.py --rounds {options.rounds}",
        "cpu_s": {name: {"median": median(each), "min": min(each), "all": each} for name, each in seconds.items()},
        "median_ratio": {
            name: round(median(a / b for a, b in zip(each, base, strict=True)), 3) for name, each in seconds.items()
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "typer")},
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
