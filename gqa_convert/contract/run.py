"""Run the contract on every generative family of the installed transformers and record what it found.

    python -m gqa_convert.contract.run --out scripts/contract/record.json --summary gqa_convert/contract/record.json

Each family runs in a process of its own with a time limit, so that one that crashes or hangs costs only itself.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

from gqa_convert.checkpoint.provenance import versions
from gqa_convert.contract.native import prove
from gqa_convert.contract.records import Record
from gqa_convert.contract.remote_code import meet_strangers
from gqa_convert.errors import UsageError
from gqa_convert.modeling import shipping
from gqa_convert.tiny.mappings import survey_model_types

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write, or to bring up to date for the named families.")
    ] = None,
    families: Annotated[list[str] | None, typer.Argument(help="Model types; all of them if none is named.")] = None,
    summary: Annotated[
        Path | None,
        typer.Option(help="Also write what the package ships: which are proven, why others are not."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Families to run at a time.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds a family may take.")] = 120.0,
) -> None:
    """Prove the contract for each model type: tied heads exact, groups = heads identical, and the rest of it."""
    names = families or survey_model_types()
    started = time.perf_counter()
    records = run_all(names, jobs=jobs, timeout=timeout)
    proven = sum(record.proven for record in records)
    refused = sum(record.refused for record in records)
    typer.echo(
        f"{len(records)} model types: {proven} proven, {refused} refused by the converter, "
        f"{len(records) - proven - refused} not proven, in {time.perf_counter() - started:.0f} s"
    )
    if out is not None and families:
        records += _kept(out, records)
    for path, values in ((out, document(records)), (summary, summarised(document(records)))):
        if path is not None:
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _kept(out: Path, records: list[Record]) -> list[Record]:
    """The records of an earlier run of the same versions that this run of named families does not replace.

    Raises:
        UsageError: if that run was made with other versions, so that its records are no longer true.
    """
    if not out.exists():
        return []
    earlier = json.loads(out.read_text(encoding="utf-8"))
    if earlier["versions"] != versions("torch", "transformers"):
        raise UsageError(f"{out}: was recorded with {earlier['versions']}. Run all families again.")
    new = {record.model_type for record in records}
    return [Record(**entry) for entry in earlier["families"] if entry["model_type"] not in new]


def document(records: list[Record]) -> dict[str, Any]:
    """Return the JSON of a run: the versions it holds for, counts, and a record for each family."""
    return {
        "versions": versions("torch", "transformers"),
        "counts": {
            "model_types": len(records),
            "proven": sum(record.proven for record in records),
            "refused": sum(record.refused for record in records),
        },
        "families": [record.to_json() for record in sorted(records, key=lambda record: record.model_type)],
    }


def summarised(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return of a run's JSON what `gqa families` shows: versions, counts, proven names, and reasons of the others."""
    families = recorded["families"]
    return {
        "versions": recorded["versions"],
        "counts": recorded["counts"],
        "proven": [family["model_type"] for family in families if family["proven"]],
        "unproven": {family["model_type"]: family["reason"] for family in families if not family["proven"]},
    }


def run_all(names: list[str], *, jobs: int = 2, timeout: float = 120.0) -> list[Record]:
    """Run the contract for each name, `jobs` at a time, and return the records in the order they finish."""
    _warm_up()
    with tempfile.TemporaryDirectory(prefix="gqa-proof-") as root:
        done = _run_each(names, Path(root), jobs, timeout)
        _meet_strangers(done, Path(root))
    return done


def _run_each(names: list[str], root: Path, jobs: int, timeout: float) -> list[Record]:
    context = multiprocessing.get_context("fork")
    waiting = list(names)
    running: list[_Running] = []
    done: list[Record] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Running(context, waiting.pop(0), root, timeout))
        time.sleep(0.02)
        for process in [process for process in running if process.finished()]:
            running.remove(process)
            done.append(process.record)
            typer.echo(f"[{len(done)}/{len(names)}] {_line(process.record)}")
    return done


class _Running:
    """One family in a child process."""

    def __init__(self, context: Any, name: str, root: Path, timeout: float) -> None:
        self.record = Record(name, reason="the process ended without a result")
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(name, root / name, sender), daemon=True)
        self._process.start()
        sender.close()

    def finished(self) -> bool:
        """Collect the result if there is one; end the process if its time is up."""
        if self._receiver.poll():
            try:
                self.record = self._receiver.recv()
            except EOFError:
                self.record.reason = f"the process ended without a result (exit code {self._exit_code()})"
        elif time.monotonic() > self._deadline:
            self._process.kill()
            self.record = Record(self.record.model_type, reason=f"took longer than {self._timeout:.0f} s")
        elif self._process.is_alive():
            return False
        self._process.join()
        self._receiver.close()
        return True

    def _exit_code(self) -> int | None:
        self._process.join()
        code: int | None = self._process.exitcode
        return code


def _warm_up() -> None:
    """Import what every child needs, once."""
    import torch
    import transformers

    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        prove("llama", Path(folder))


def _child(name: str, folder: Path, sender: Connection) -> None:
    """Prove one family in a folder of its own, and keep of it what a stranger is to load."""
    record = prove(name, folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != "converted" or not record.proven:
            shutil.rmtree(path)
    sender.send(record)
    sender.close()


def _meet_strangers(records: list[Record], root: Path) -> None:
    """Load every model whose modelling code is shipped in a fresh process that has no gqa_convert."""
    shipped = [record for record in records if record.proven and shipping.ships(record.model_type)]
    if not shipped:
        return
    troubles_by_family = meet_strangers(
        [root / record.model_type / "converted" for record in shipped], root / "modules"
    )
    for record, troubles in zip(shipped, troubles_by_family, strict=True):
        record.checks["loads_without_gqa_convert"] = record.proven = not troubles
        record.reason = troubles and f"loads_without_gqa_convert: {troubles}"
        typer.echo(f"without gqa_convert: {_line(record)}")


def _line(record: Record) -> str:
    state = "proven" if record.proven else "refused" if record.refused else "NOT PROVEN"
    return f"{record.model_type}: {state} ({record.seconds:.1f} s){' ' + record.reason if record.reason else ''}"


if __name__ == "__main__":
    app()
