"""Runs the pieces of `check.sh`, each a process of its own with a time limit, and writes one JSON and one page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 540
"""Seconds of a piece."""
_TAIL = 3000
_EXTRA = 30
"""Seconds that a piece has to end by itself once it is asked to."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large things are.

    Attributes:
        model: settings of the Llama that is trained and converted.
        context: tokens of a sequence.
        sequences: of a step.
        steps: of a timed run; the first few are left out of the figures.
        groups: KV heads after conversion.
        device: what commands are told.
    """

    model: dict[str, Any]
    context: int
    sequences: int
    micro: int
    steps: int
    groups: int
    device: str


GPU = Scale(
    model={"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 16,
           "num_key_value_heads": 16, "vocab_size": 32000, "max_position_embeddings": 4096},
    context=2048, sequences=16, micro=4, steps=20, groups=4, device="auto",
)  # fmt: skip
CPU = Scale(
    model={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256},
    context=32, sequences=4, micro=2, steps=6, groups=2, device="cpu",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One thing to run.

    Attributes:
        name: of the piece.
        command: what is run.
        environment: set beside what there is.
        figures: reads what came of it.
        needs: devices.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    figures: Callable[[str], dict[str, Any]]
    needs: int = 1


def main() -> int:
    """Run what is missing; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--list", action="store_true", help="name the pieces and their commands")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU, to try this script")
    options = parser.parse_args()
    import torch

    if not options.cpu and not torch.cuda.is_available() and not options.list:
        print("check: no CUDA device here; --cpu tries the script out.", file=sys.stderr)
        return 2
    scale = CPU if options.cpu else GPU
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    devices = torch.cuda.device_count() if not options.cpu else 2
    pieces = all_pieces(out, scale, devices)
    unknown = sorted(set(options.only) - {piece.name for piece in pieces})
    if unknown:
        print(f"check: no piece {', '.join(unknown)}; there are {', '.join(p.name for p in pieces)}.", file=sys.stderr)
        return 2
    if options.list:
        for piece in pieces:
            print(f"{piece.name}: {' '.join(piece.command)}")
        return 0
    report = kept(out / "check.json")
    report |= {"device": device_name(options.cpu), "devices": devices, "versions": versions()}
    if not (out / "model" / "config.json").is_file():
        make_model(out, scale)
    for piece in pieces:
        before = report["pieces"].get(piece.name, {})
        if (options.only and piece.name not in options.only) or (before.get("passed") and not options.again):
            continue
        print(f"{piece.name} ...", flush=True)
        report["pieces"][piece.name] = run(piece, devices)
        write(out, report)
        print(f"  {summary(report['pieces'][piece.name])}", flush=True)
    write(out, report)
    return int(any(not result["passed"] and not result.get("skipped") for result in report["pieces"].values()))


def all_pieces(out: Path, scale: Scale, devices: int) -> list[Piece]:
    """Every piece, in the order in which they need each other."""
    python, model, grouped = sys.executable, str(out / "model"), str(out / "grouped")
    text = str(out / "text.jsonl")
    cli = [python, "-m", "gqa_convert.cli"]
    convert = [python, "-c", "from gqa_convert.cli.main import convert_main; convert_main()", model]
    plain: dict[str, str] = {}

    def training(name: str, *changes: str, teacher: bool = False) -> Piece:
        config = write_run(out, name, scale, teacher=teacher)
        given = [word for change in changes for word in ("--set", change)]
        return Piece(
            name=name,
            command=[*cli, "uptrain", str(config), *given],
            environment=plain,
            figures=lambda _: speed(out / "runs" / name, scale),
        )

    def many(engine: str) -> Piece:
        config = write_run(out, engine, scale, teacher=True)
        return Piece(
            name=engine,
            command=["bash", str(REPOSITORY / "scripts/launch/many_gpus.sh"), str(config)],
            environment={"ENGINE": engine, "PROCESSES": str(devices), "PYTHON": python},
            figures=lambda _: speed(out / "runs" / engine, scale),
            needs=2,
        )

    def conversion(preset: str, *more: str) -> Piece:
        target = grouped if preset == "fast" else str(out / preset)
        return Piece(
            name=f"convert-{preset}",
            command=[*convert, "-g", str(scale.groups), "--preset", preset, "-o", target, "--force", *more],
            environment=plain,
            figures=lambda _: {},
        )

    on_cpu = scale is CPU
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "--no-header", str(REPOSITORY / "tests")]
    return [
        Piece(name="tests", command=tests, environment=plain, figures=tested),
        conversion("fast"),
        conversion("best", "--calibrate", text),
        training("train"),
        training("train-distilled", teacher=True),
        training("train-compiled", "train.compile=true"),
        *([] if on_cpu else [many("ddp"), many("fsdp2")]),
        Piece(
            name="heal",
            command=[*cli, "heal", grouped, model, "--text", text, "--held-out", text, "--out", str(out / "healed"),
                     "--force", "--tokens", "2k" if on_cpu else "500k", "--json"],
            environment=plain,
            figures=lambda said: json.loads(said[said.index("{"):]),
        ),
        Piece(
            name="decode",
            command=[*cli, "bench", model, grouped, "--mode", "eager" if on_cpu else "graph",
                     "--batch", "1,2" if on_cpu else "1,8,32", "--cache-context", "32" if on_cpu else "512,2k",
                     "--cache", "static", "--rounds", "2" if on_cpu else "7", "--prefill-tokens", "0",
                     "--device", scale.device, "--json"],
            environment=plain,
            figures=lambda said: json.loads(said[said.index("{"):]),
        ),
    ]  # fmt: skip


def run(piece: Piece, devices: int) -> dict[str, Any]:
    """Run a piece, and end it when its time is over."""
    if devices < piece.needs:
        return {"passed": False, "skipped": f"needs {piece.needs} devices, there are {devices}"}
    environment = {**os.environ, **piece.environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])])
    started = time.monotonic()
    process = subprocess.Popen(
        piece.command, env=environment, cwd=REPOSITORY, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    late = False
    try:
        said, complained = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGTERM)
        try:
            said, complained = process.communicate(timeout=_EXTRA)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, complained = process.communicate()
    result: dict[str, Any] = {
        "command": " ".join(piece.command),
        "seconds": round(time.monotonic() - started, 1),
        "code": process.returncode,
        "passed": process.returncode == 0,
    }
    if late:
        result["problem"] = f"not done after {LIMIT} seconds; the next call goes on where it can"
    try:
        result["figures"] = piece.figures(said) if result["passed"] else {}
    except Exception as error:
        result |= {"passed": False, "problem": f"its figures could not be read ({type(error).__name__}: {error})"}
    if not result["passed"]:
        result["tail"] = (said + complained)[-_TAIL:]
    return result


def make_model(out: Path, scale: Scale) -> None:
    """A random model with a tokenizer, and text of its words."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    dtype = torch.float32 if scale is CPU else torch.bfloat16
    model: Any = LlamaForCausalLM(LlamaConfig(**scale.model))
    model.to(dtype).save_pretrained(out / "model")
    words = [f"w{number}" for number in range(scale.model["vocab_size"] - 3)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *words])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(out / "model")
    draw = random.Random(0)
    tokens = max(200_000, scale.context * scale.sequences * scale.steps) if scale is GPU else 60_000
    with open(out / "text.jsonl", "w") as file:
        for _ in range(tokens // 500):
            file.write(json.dumps({"text": " ".join(draw.choices(words[:400], k=500))}) + "\n")


def write_run(out: Path, name: str, scale: Scale, *, teacher: bool) -> Path:
    """The configuration of a short run, without what would blur its figures."""
    objective = {"distillation": {"teacher": str(out / "model")}} if teacher else {}
    settings = {
        "model": str(out / "grouped"),
        "output": str(out / "runs" / name),
        "budget": {"steps": scale.steps},
        "data": {"source": {"kind": "jsonl", "paths": [str(out / "text.jsonl")]}, "context": scale.context},
        "objective": objective,
        "schedule": {"kind": "constant", "peak": 1e-4},
        "train": {
            "batch_sequences": scale.sequences,
            "micro_batch": scale.micro if name not in ("ddp", "fsdp2") else 1,
            "precision": "float32" if scale is CPU else "bf16",
            "device": scale.device,
        },
        "checkpoints": {"every_minutes": None},
        "evaluation": {"tokens": scale.context * 4},
        "log": {"trackers": []},
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(settings, indent=1))
    return path


def speed(run_folder: Path, scale: Scale) -> dict[str, Any]:
    """Median tokens per second and MFU of a run's later steps, and its peak memory."""
    from statistics import median

    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    later = steps[min(5, len(steps) - 1) :]
    figures: dict[str, Any] = {
        name: median(record[name] for record in later) for name in ("tokens_per_second", "mfu") if name in later[0]
    }
    return figures | {
        "peak_memory_bytes": max(record.get("peak_memory_bytes", 0) for record in steps),
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
        "steps": len(steps),
    }


def tested(said: str) -> dict[str, Any]:
    """Pytest's last line."""
    return {"pytest": said.strip().splitlines()[-1] if said.strip() else ""}


def device_name(cpu: bool) -> str:
    """The device in words."""
    import torch

    return platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name()


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: version(name) for name in ("torch", "transformers", "accelerate")} | {
        "python": platform.python_version()
    }


def kept(path: Path) -> dict[str, Any]:
    """What an earlier call has found."""
    try:
        report = json.loads(path.read_text())
        return report if isinstance(report.get("pieces"), dict) else {"pieces": {}}
    except (OSError, ValueError, AttributeError):
        return {"pieces": {}}


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    if result.get("skipped"):
        return f"left out: {result['skipped']}"
    state = "passed" if result["passed"] else f"FAILED ({result.get('problem') or 'exit code ' + str(result['code'])})"
    figures = result.get("figures") or {}
    shown = [f"{name} {figures[name]:,.3g}" for name in ("tokens_per_second", "mfu") if name in figures]
    return ", ".join(
        [state, f"{result['seconds']:,.0f} s", *shown, *([figures["pytest"]] if "pytest" in figures else [])]
    )


def write(out: Path, report: dict[str, Any]) -> None:
    """Write the JSON and the page, each whole."""
    page = [f"# Check on {report['devices']} x {report['device']}", "", "| piece | result |", "|---|---|"]
    page += [f"| {name} | {summary(result)} |" for name, result in report["pieces"].items()]
    failed = {n: r for n, r in report["pieces"].items() if not r["passed"] and not r.get("skipped")}
    for name, result in failed.items():
        page += ["", f"## {name}", "", f"`{result['command']}`", "", "```", result.get("tail", "").strip(), "```"]
    for name, text in (("check.json", json.dumps(report, indent=1)), ("check.md", "\n".join(page))):
        beside = out / f".{name}.part"
        beside.write_text(text + "\n")
        beside.replace(out / name)


if __name__ == "__main__":
    sys.exit(main())
