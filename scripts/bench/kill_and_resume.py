#!/usr/bin/env python3
"""Kill a run with SIGKILL at random moments of its life until it ends, then another; look each time.

    python scripts/bench/kill_and_resume.py --kills 200 --out scripts/bench/results/uptrain_kills.json
    python scripts/bench/kill_and_resume.py --kind shards|chat|mixture|cached|beside|averaged --kills 200
    python scripts/bench/kill_and_resume.py --config CONFIG --kills 30 [--set a.b=c ...]

Without a configuration a run of tiny models is used, whose starts take a second: kills then fall everywhere, into
tokenising, training, saving, and writing the result. After each kill every folder that counts as a checkpoint must be
whole, none newer than the one before it may be lost, and `final` is whole or not there. Each run that ends at last
must have the files of one that was never disturbed, byte for byte, and its metrics every line once. Of `--kind`:
checkpoints in torch's distributed format, as FSDP2 writes them (by one process); conversations in a template; two
sources mixed, one of them conversations; a teacher's cached words; checkpoints written beside the training; an average
of the weights, the best checkpoint by it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
import yaml
from tiny_run import WORDS, make_model, make_text, settings
from warm import import_all, in_fork, kill_after, start

from gqa_convert.uptrain.checkpoints import MARKER, CheckpointStore, damage

STEPS, EVERY = 30, 2
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
CHAT = {"source": "data/chat.jsonl", "separate_documents": True, "held_out_fraction": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shards": {},
    "chat": {"data": CHAT},
    "mixture": {
        "data": {
            "source": None,
            "sources": [{"source": "data/text.jsonl", "weight": 0.7}, {"source": "data/chat.jsonl", "weight": 0.3}],
            "held_out_fraction": 0.2,
        }
    },
    "cached": {"objective": {"distillation": {"teacher": "teacher", "dtype": "float32", "cache": "cache"}}},
    "beside": {"checkpoints": {"asynchronous": True}},
    "averaged": {
        "averaging": {"decay": 0.9, "every_steps": 2},
        "evaluation": {"best": True},
        "checkpoints": {"asynchronous": True},
    },
}
"""What differs from the usual run; of `shards` the writer does."""
MACHINES_OWN = ("tokens_per_second", "tokens_per_second_overall", "peak_memory_bytes")
"""What the machine and not the run decides, in its metrics."""


def train(config: Path, output: Path, sets: list[str], *, shards: bool = False) -> None:
    """The whole of one start."""
    if shards:
        from gqa_convert.uptrain import shards as sharded
        from gqa_convert.uptrain import state

        writers: Any = state
        writers.save_whole = sharded.save_shards
    from gqa_convert.uptrain.loop import uptrain
    from gqa_convert.uptrain.read_config import load_config

    os.chdir(config.parent)
    uptrain(load_config(config, [*sets, f"output={output}", "log.trackers=[]"]), quiet=True)


def look(output: Path, before: int) -> dict[str, Any]:
    """What a kill has left; stops the script if it is anything that must not be."""
    store = CheckpointStore(output / "checkpoints", 2)
    marked = store.steps()
    bad = [step for step in marked if damage(store.path(step), step)]
    newest = store.newest()
    if bad or (newest.step if newest else -1) < before:
        raise SystemExit(f"after a kill: damaged {bad}, newest {newest}, it was step {before}")
    final = output / "final"
    if final.exists() and not {"config.json", "model.safetensors", "gqa_convert.json"} <= names(final):
        raise SystemExit(f"after a kill the result is in parts: {sorted(names(final))}")
    saving = any((output / "checkpoints").glob(".saving-*")) if marked or (output / "checkpoints").is_dir() else False
    tokens = output / "tokens"
    return {
        "newest_whole": newest.step if newest else None,
        "unfinished_save": saving or any(not (p / MARKER).is_file() for p in (output / "checkpoints").glob("step-*")),
        "unfinished_tokens": tokens.is_dir() and any(p.name.startswith(".") for p in tokens.iterdir()),
        "unfinished_result": any(p.name.startswith(".final.") for p in output.iterdir()) if output.is_dir() else False,
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def compare(output: Path, undisturbed: Path) -> list[str]:
    """How a finished run differs from one that was never disturbed."""
    problems = []
    one, two = output / "final", undisturbed / "final"
    if names(one) != names(two):
        problems.append(f"files {sorted(names(one) ^ names(two))}")
    for name in names(one) & names(two) - {"gqa_convert.json"}:
        if (one / name).read_bytes() != (two / name).read_bytes():
            problems.append(f"{name} differs")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    if len(set(lines)) != len(lines):
        problems.append("a line of metrics.jsonl is there twice")
    if records(output) != records(undisturbed):
        problems.append("metrics.jsonl differs")
    left = [p.name for p in output.rglob(".*") if p.name.startswith((".saving-", ".final.")) or ".tmp-" in p.name]
    if left:
        problems.append(f"left behind: {left}")
    return problems


def records(output: Path) -> list[dict[str, Any]]:
    """What a run has measured, without speeds and without what was said of its being resumed."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in MACHINES_OWN}
        for record in lines
        if record["kind"] != "event"
    ]


def prepare(options: argparse.Namespace, work: Path) -> tuple[Path, list[str]]:
    """The configuration to run, and overrides."""
    if options.config is not None:
        return options.config.absolute(), [*options.set, f"checkpoints.every_steps={options.every}"]
    make_model(work / "model")
    make_text(work / "data")
    make_chat(work)
    path = work / "run.yaml"
    changes = KINDS[options.kind]
    usual = {"budget": {"steps": STEPS}, "checkpoints": {"every_steps": options.every},
             "evaluation": {"every_tokens": 640}}  # fmt: skip
    merged = {key: {**usual.get(key, {}), **changes.get(key, {})} for key in {*usual, *changes}}
    path.write_text(yaml.safe_dump(settings(**merged)))
    if options.kind == "cached":
        make_model(work / "teacher", kv_heads=4, seed=1, sharpness=30.0)
        in_fork(lambda: cache(path), seconds=600)
    return path, options.set


def make_chat(work: Path) -> None:
    """A template for the model, and conversations."""
    (work / "model" / "chat_template.jinja").write_text(TEMPLATE)
    draw = random.Random(0)
    with open(work / "data" / "chat.jsonl", "w") as file:
        for _ in range(150):
            said = draw.choice(WORDS)
            turns = [{"role": "user", "content": said}, {"role": "assistant", "content": f"{said} {said}"}]
            file.write(json.dumps({"messages": turns}) + "\n")


def cache(config: Path) -> None:
    """What the teacher says, written down before the run."""
    from gqa_convert.uptrain.read_config import load_config
    from gqa_convert.uptrain.teacher_cache import cache_teacher

    os.chdir(config.parent)
    cache_teacher(load_config(config, []), Path("cache"), top_k=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--kind", choices=list(KINDS), default="plain")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)  # threads do not survive a fork
    transformers.logging.set_verbosity_error()
    import_all(["gqa_convert.uptrain.loop", "gqa_convert.uptrain.read_config", "accelerate", "datasets"])
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        work = Path(name)
        config, sets = prepare(options, work)
        shards = options.kind == "shards"
        undisturbed = work / "undisturbed"

        def undisturbed_run() -> list[str]:
            train(config, undisturbed, sets, shards=shards)
            return sorted(sys.modules)

        outcome = in_fork(undisturbed_run, seconds=3600)
        if outcome.value is None:
            raise SystemExit("the undisturbed run fails")
        import_all(outcome.value)
        life = in_fork(
            lambda: train(config, work / "again", sets, shards=shards), seconds=3600
        ).seconds  # nothing left to import
        problems = compare(work / "again", undisturbed)
        if problems:
            raise SystemExit(f"two undisturbed runs differ: {problems}")
        kills: list[dict[str, Any]] = []
        finished = whole = 0
        before, output = -1, work / "run-0"
        while len(kills) < options.kills or before >= 0:
            enough = len(kills) >= options.kills
            child = start(lambda output=output: train(config, output, sets, shards=shards))  # type: ignore[misc]
            status = kill_after(child, None if enough else draw.uniform(0, life))
            if status == 0:
                problems = compare(output, undisturbed)
                if problems:
                    raise SystemExit(f"run {finished}: {'; '.join(problems)}")
                finished, whole, before = finished + 1, whole + 1, -1
                shutil.rmtree(output)
                output = work / f"run-{finished}"
                continue
            if status != -9:
                raise SystemExit(f"a start ended with {status}")
            kills.append({"resumed_from": before if before >= 0 else None, **look(output, before)})
            newest = kills[-1]["newest_whole"]
            before = -1 if newest is None else newest
    result = {
        "what": "SIGKILL at random moments of a run's life; every start went on from a whole checkpoint",
        "command": f"python scripts/bench/kill_and_resume.py --kind {options.kind} --kills {options.kills}",
        "kills": len(kills),
        "runs_that_ended": finished,
        "equal_byte_for_byte_to_an_undisturbed_run": whole,
        "metrics_without_a_doubled_line": whole,
        "killed_while_saving": sum(kill["unfinished_save"] for kill in kills),
        "killed_while_tokenising": sum(kill["unfinished_tokens"] for kill in kills),
        "killed_while_writing_the_result": sum(kill["unfinished_result"] for kill in kills),
        "killed_before_the_first_checkpoint": sum(kill["newest_whole"] is None for kill in kills),
        "wall_s": round(time.monotonic() - started, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {n: version(n) for n in ("gqa-convert", "torch", "transformers", "accelerate")},
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
