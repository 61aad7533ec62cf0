"""A tiny converted-looking Llama with a tokenizer, some text, and a configuration: a step takes milliseconds."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))

from tiny_run import WORDS as WORDS
from tiny_run import make_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "teacher", kv_heads=4, seed=1, sharpness=30.0)


def make_tiny(folder: Path, **changes: Any) -> Path:
    make_model(folder, rope_theta=50000.0, **changes)
    (folder / "NOTICE.txt").write_text("kept")
    return folder


def mark_again(folder: Path) -> None:
    """Write a marker that fits what is in the folder now, as somebody who means harm would."""
    from gqa_convert.uptrain.checkpoints import MARKER, _digests, _files

    paths = [path for path in _files(folder) if path.name != MARKER]
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    (folder / MARKER).write_text(json.dumps({"step": 0, "files": files}))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with open(path, "w") as file:
        for _ in range(600):
            # Every word is followed by one of two: something to learn.
            at = rng.randrange(len(WORDS))
            words = []
            for _ in range(rng.randrange(4, 40)):
                words.append(WORDS[at])
                at = (at * 2 + rng.randrange(2)) % len(WORDS)
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.fixture
def settings(tiny_folder: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_folder),
        "output": str(tmp_path / "run"),
        "budget": {"steps": 20},
        "data": {
            "source": {"kind": "jsonl", "paths": [str(text_file)]},
            "context": 32,
            "held_out_fraction": 0.05,
            "window": 16,
        },
        "schedule": {"kind": "cosine", "peak": 0.01, "warmup_fraction": 0.1},
        "train": {"batch_sequences": 4, "micro_batch": 2, "precision": "float32", "device": "cpu"},
        "log": {"trackers": []},
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    def write(settings: dict[str, Any], name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
