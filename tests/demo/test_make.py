"""The script that made the checkpoint, at a tiny setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo_checkpoint.py"
TINY = "--steps 3 --every 2 --batch 2 --vocab 300 --width 16 --layers 1 --heads 2 --mlp 32 --context 16 --modules 4"


def test_three_steps(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *TINY.split(), "--threads", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["steps"] for line in done.stdout.splitlines()] == [2, 3]
    record = json.loads((out / "training.json").read_text())
    assert record["tokens"] == 3 * 2 * 16
    assert 0 < record["held_out_loss_nats_per_token"] < 10
    assert AutoModelForCausalLM.from_pretrained(out).config.num_key_value_heads == 2
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("é = 1\n")["input_ids"]) == "é = 1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
