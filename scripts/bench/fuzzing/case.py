"""One case in a forked child: damage a folder, run the commands over it, and say what came of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzzing.models import BASES, loading_faults
from fuzzing.mutations import CANARY, mutate
from gqa_convert.cli import main as cli

CPU_SECONDS = 20
MEMORY = 2 << 30
_TIDY = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


class Watch:
    """Notes every file that is opened outside, and every one that is written, made or removed outside the case."""

    def __init__(self, work: Path) -> None:
        self.work, self.outside = os.path.realpath(work), os.path.realpath(work / "outside")
        self.faults: list[str] = []
        self.on = False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or path is None:
                return
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self._check(path, event, writes)
        elif event in _TIDY:
            self._check(arguments[0], event, True)
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
            self.faults.append(f"{event} {str(arguments)[:100]}")

    def _check(self, path: Any, event: str, writes: bool) -> None:
        self.on = False
        try:
            real = os.path.realpath(os.fsdecode(path))
            below = real == self.work or real.startswith(self.work + os.sep)
            if real == self.outside or real.startswith(self.outside + os.sep):
                self.faults.append(f"{event} outside: {os.path.basename(real)}")
            elif writes and not below and not real.startswith(("/dev/", "/proc/")):
                self.faults.append(f"{event} {real}")
        except (ValueError, OSError):
            pass
        finally:
            self.on = True


def command(*arguments: object) -> tuple[int, str, str, str]:
    """Run `gqa` in this process: exit code, output, errors, and the traceback of whatever escaped."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True),
        io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True),
    )
    sys.argv = ["gqa", *map(str, arguments)]
    code, escaped = 0, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            code, escaped = -1, _where(error)
            if os.environ.get("FUZZ_TRACEBACKS"):
                traceback.print_exc(file=sys.__stderr__)
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]
    return code, texts[0], texts[1], escaped


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "gqa_convert" in frame.filename] or frames
    last, end = ours[-1], frames[-1]
    at = f"{Path(last.filename).name}:{last.lineno}" + (
        "" if last is end else f" via {Path(end.filename).name}:{end.lineno}"
    )
    return f"{type(error).__name__} at {at}: {str(error)[:160]}"


def run_case(bases: Path, work: Path, seed: int, number: int, *, short: bool = False) -> dict[str, Any]:
    """Run one case in `work`, an empty folder. Everything depends on the two numbers alone.

    `short` converts and reloads, and leaves the other commands to one case in ten.
    """
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(list(BASES))
    base = BASES[name]
    source, out = work / "source", work / "out"
    shutil.copytree(bases / name, source)
    _outside(work / "outside")
    done = mutate(source, rng)
    options = _options(base.groups, rng)
    result: dict[str, Any] = {"case": number, "base": name, "mutations": done, "options": options, "faults": []}
    before = snapshot(source)
    watch = Watch(work)
    watch.on = True
    _commands(result, source, out, options, rng, converting_only=short and number % 10 != 0)
    watch.on = False
    faults = result["faults"]
    faults += [f"outside: {fault}" for fault in dict.fromkeys(watch.faults)]
    if (work / "outside" / "exploded").exists():
        faults.append("outside: code of the checkpoint was run")
    if snapshot(source) != before:
        faults.append("outside: the source was changed")
    if _leaks(out):
        faults.append("outside: the output holds a file from outside")
    mine = {"source", "out", "outside", "tmp", ".out.work"}  # the last is kept to go on from
    strays = sorted(set(os.listdir(work)) - mine) + os.listdir(work / "tmp")
    if strays:
        faults.append(f"left behind: {strays[0]}")
    peak = _peak()
    result["peak_mb"] = peak // 10**6
    if peak > MEMORY:
        faults.append(f"memory: {peak / 1e9:.1f} GB")
    return result


def _commands(
    result: dict[str, Any],
    source: Path,
    out: Path,
    options: list[str],
    rng: random.Random,
    *,
    converting_only: bool,
) -> None:
    converted = _step(result, "convert", "convert", source, "--out", out, "--no-flush", *options)
    if converted != 0 and out.exists():
        result["faults"].append("left behind: an output after a refusal")
    if converted == 0:
        _reload(result, out)
    if converting_only:
        return
    if converted == 0:
        _step(
            result,
            "verify",
            "verify",
            source,
            out,
            *(["--trust-remote-code"] if "--trust-remote-code" in options else []),
        )
        if result["codes"]["verify"] not in (0, -1) and "none" not in options:
            result["faults"].append(f"verify refuses what convert wrote: {result['said']['verify']}")
    if rng.random() < 0.5:
        _step(result, "inspect", "inspect", source)
    if converted == 0 and rng.random() < 0.3:
        _step(result, "again", "convert", source, "--out", out, "--no-flush", "--force", *options)


def _step(result: dict[str, Any], step: str, *arguments: object) -> int:
    started = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(_cpu(started)) + CPU_SECONDS + 1, resource.RLIM_INFINITY))
    code, _, said, escaped = command(*arguments)
    seconds = _cpu(resource.getrusage(resource.RUSAGE_SELF)) - _cpu(started)
    result.setdefault("codes", {})[step] = code
    result.setdefault("seconds", {})[step] = round(seconds, 2)
    lines = [line for line in said.splitlines() if line.strip()]
    result.setdefault("said", {})[step] = lines[-1][:300] if lines else ""
    faults = result["faults"]
    if escaped:
        faults.append(f"traceback: {step}: {escaped}")
    elif "Traceback (most recent call last)" in said:
        faults.append(f"traceback: {step}: printed")
    elif code not in (0, 2, 3, 4, 5, 6):
        faults.append(f"exit code: {step}: {code}")
    elif code and (
        not lines or not lines[-1].startswith("error: ") or len([x for x in lines if x.startswith("error: ")]) != 1
    ):
        faults.append(f"unclear: {step}: {lines[-1][:200] if lines else 'nothing was said'}")
    if seconds > CPU_SECONDS:
        faults.append(f"hang: {step}: {seconds:.0f} s")
    return code


def _reload(result: dict[str, Any], out: Path) -> None:
    """What is called verified must load, whole."""
    if "none" in result["options"]:
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            faults = loading_faults(out)
    except BaseException as error:
        faults = {"raised": [_where(error)]}
    for kind, names in faults.items():
        result["faults"].append(f"does not load: {kind} {names[0]}")
    result["reloaded"] = not faults


def _options(groups: tuple[int, ...], rng: random.Random) -> list[str]:
    options = ["--groups", str(rng.choice((*groups, *groups, *groups, 4, 3, 0)))]
    options += ["--verify", rng.choices(("structure", "logits", "none"), (8, 2, 0.5))[0]]
    options += ["--method", rng.choices(("mean", "first", "random", "pca"), (8, 1, 1, 1))[0]]
    if rng.random() < 0.1:
        options += ["--route", rng.choice(("native", "remote-code"))]
    if rng.random() < 0.1:
        options += ["--allow-slow"]
    if rng.random() < 0.9:
        options += ["--no-measure"]
    return options


def _outside(folder: Path) -> None:
    """What no case may touch: files that would even be read as weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "secret.json").write_text(json.dumps({"token": CANARY}))
    save_file({"x": torch.ones(2)}, folder / "secret.safetensors", {"note": CANARY})
    torch.save({CANARY: torch.ones(2)}, folder / "secret.bin")


def snapshot(folder: Path) -> dict[str, str]:
    """Names, kinds and contents below a folder."""
    states = {}
    for root, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            state = os.lstat(path)
            digest = ""
            if os.path.isfile(path) and not os.path.islink(path) and state.st_size < 1 << 26:
                with open(path, "rb") as file:
                    digest = hashlib.sha256(file.read()).hexdigest()
            states[os.fsdecode(path)] = f"{state.st_mode} {state.st_size} {state.st_mtime_ns} {digest}"
    return states


def _leaks(out: Path) -> bool:
    return any(CANARY.encode() in file.read_bytes() for file in _regular(out))


def _regular(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _peak() -> int:
    """Largest resident set of this process since its mark was cleared, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def limit_memory() -> None:
    """Let this process grow by 2 GB of data at most, and count its peak from now on."""
    lines = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
